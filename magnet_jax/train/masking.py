"""Which tokens are hidden: masking rates, span counts and span masks (section 3.1, Appendix C)."""

import functools

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


@functools.cache
def _counts_by_length(most: int, span_length: int) -> np.ndarray:
    """`span_counts` of every length up to `most`, int32 [most + 1, 101]; 0 where no span fits."""
    counts = np.zeros((most + 1, 101), np.int32)
    for length in range(min(span_length, most), most + 1):
        counts[length] = span_counts(length, span_length)
    return counts


def span_count(
    num_frames_B: jax.Array, rate_B: jax.Array, span_length: int, most: int
) -> jax.Array:
    """`span_counts` at the rates, rounded to a per cent, of rows that differ in length. int32 [B].

    `most` is the greatest length that may come. Lengths below a span's have a count of 0.
    """
    percent_B = jnp.round(rate_B * 100).astype(jnp.int32)
    return jnp.asarray(_counts_by_length(most, span_length))[num_frames_B, percent_B]


def span_mask(
    uniform_BT: jax.Array, rate_B: jax.Array, span_length: int, first_B: jax.Array | None = None
) -> jax.Array:
    """Masks overlapping spans until the mean share of masked frames is `rate_B`.

    Args:
      uniform_BT: numbers drawn uniformly from [0, 1); they choose the span starts.
      rate_B: wanted masking rates in [0, 1], which spans longer than a frame meet to a per cent.
      span_length: frames a start masks, itself included, cut at the end of the sequence.
      first_B: frames before this one are not masked, and do not count; None is all from the first.

    Returns:
      bool [B, T], True where a token is hidden; at least one span a row, if it has a frame.
    """
    num_frames = uniform_BT.shape[1]
    if first_B is None:
        first_B = jnp.zeros(len(uniform_BT), jnp.int32)
    free_BT = jnp.arange(num_frames)[None] >= first_B[:, None]
    length_B = num_frames - first_B
    if span_length == 1:
        count_B = jnp.round(rate_B * length_B).astype(jnp.int32)
    else:
        count_B = span_count(length_B, rate_B, span_length, num_frames)
    # argsort of uniform numbers is a uniform permutation: its entries below u are u random places.
    # Frames that do not count sort first, so they stay in place and the others are permuted.
    order_BT = jnp.argsort(jnp.where(free_BT, uniform_BT, -1.0), axis=-1)
    last_B = first_B + jnp.maximum(count_B, 1)
    return _extended((order_BT < last_B[:, None]) & free_BT, span_length)


def _extended(start_BT: jax.Array, span_length: int) -> jax.Array:
    """Span starts as spans, cut at the end."""
    mask_BT = start_BT
    for shift in range(1, span_length):
        mask_BT = mask_BT | jnp.pad(start_BT, ((0, 0), (shift, 0)))[:, : start_BT.shape[1]]
    return mask_BT
