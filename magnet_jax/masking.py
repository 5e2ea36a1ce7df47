"""Which tokens are hidden: masking rates, span counts and span masks (section 3.1, Appendix C)."""

import jax
import jax.numpy as jnp
import numpy as np


def masking_rate(fraction: jax.Array) -> jax.Array:
    """The cosine schedule, cos(pi/2 * fraction): 1 at the start of decoding, 0 at its end."""
    return jnp.cos(jnp.pi / 2 * fraction)


def expected_rate(num_frames: int, span_length: int) -> np.ndarray:
    """Mean share of masked frames for 0..T span starts: 1 - C(T-l, u) / C(T, u) (equation 8)."""
    starts = np.arange(num_frames)
    # C(T-l, u+1)/C(T, u+1) follows from C(T-l, u)/C(T, u) by one factor, so nothing overflows.
    factors = np.maximum(num_frames - span_length - starts, 0) / (num_frames - starts)
    return 1 - np.concatenate([[1.0], np.cumprod(factors)])


def span_counts(num_frames: int, span_length: int) -> np.ndarray:
    """How many span starts reach a mean masking rate of 0, 1, ..., 100 per cent.

    The inverse of `expected_rate` as the reference tabulates it: the least count whose expected
    rate is at least the wanted one. int32 [101].
    """
    if span_length > num_frames:
        raise ValueError(f"a span of {span_length} frames does not fit into {num_frames} frames")
    rates = np.arange(101) / 100
    expected = expected_rate(num_frames, span_length)
    return np.searchsorted(expected, rates, side="left").astype(np.int32)


def span_mask(uniform_BT: jax.Array, rate_B: jax.Array, span_length: int) -> jax.Array:
    """Masks overlapping spans until the mean share of masked frames is `rate_B`.

    Args:
      uniform_BT: numbers drawn uniformly from [0, 1); they choose the span starts.
      rate_B: wanted masking rates in [0, 1].
      span_length: frames a start masks, itself included, cut at the end of the sequence.

    Returns:
      bool [B, T], True where a token is hidden; at least one span a row.
    """
    num_frames = uniform_BT.shape[1]
    if span_length == 1:
        count_B = jnp.round(rate_B * num_frames).astype(jnp.int32)
    else:
        table = jnp.asarray(span_counts(num_frames, span_length))
        count_B = table[jnp.round(rate_B * 100).astype(jnp.int32)]
    # argsort of uniform numbers is a uniform permutation: its entries below u are u random places.
    start_BT = jnp.argsort(uniform_BT, axis=-1) < jnp.maximum(count_B, 1)[:, None]
    mask_BT = start_BT
    for shift in range(1, span_length):
        mask_BT = mask_BT | jnp.pad(start_BT, ((0, 0), (shift, 0)))[:, :num_frames]
    return mask_BT
