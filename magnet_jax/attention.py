"""Attention: over everything, over near frames, over the past, and from frames to text.

All functions take and return [batch, length, heads, head size] and compute the softmax in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _scores(query_BTNH: jax.Array, key_BSNH: jax.Array) -> jax.Array:
    scale = query_BTNH.shape[-1] ** -0.5
    return scale * jnp.einsum(
        "BTNH,BSNH->BNTS", query_BTNH, key_BSNH, preferred_element_type=jnp.float32
    )


def full_attention(query_BTNH: jax.Array, key_BTNH: jax.Array, value_BTNH: jax.Array) -> jax.Array:
    """Every frame attends to every frame; stage 0 (section 3.2). O(T^2)."""
    weights_BNTS = jax.nn.softmax(_scores(query_BTNH, key_BTNH), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(value_BTNH.dtype), value_BTNH)


def dense_local_attention(
    query_BTNH: jax.Array, key_BTNH: jax.Array, value_BTNH: jax.Array, context: int
) -> jax.Array:
    """`local_attention` by way of a T x T mask: the plain statement the fast one is held to."""
    frames = jnp.arange(query_BTNH.shape[1])
    near_TS = jnp.abs(frames[:, None] - frames[None, :]) <= context
    scores_BNTS = jnp.where(near_TS, _scores(query_BTNH, key_BTNH), -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(value_BTNH.dtype), value_BTNH)


def local_attention(
    query_BTNH: jax.Array,
    key_BTNH: jax.Array,
    value_BTNH: jax.Array,
    context: int,
    *,
    block: int = 32,
) -> jax.Array:
    """Frame i attends to the frames j with |i - j| <= context; stages above 0 (section 3.2).

    Queries go in blocks of `block` frames; each block sees its own frames and a halo of `context`
    to both sides, so cost and memory grow with T, never with T^2.
    """
    num_frames = query_BTNH.shape[1]
    block = min(block, num_frames)
    num_blocks = -(-num_frames // block)
    window = block + 2 * context
    tail = num_blocks * block - num_frames

    def split(array_BTNH: jax.Array) -> jax.Array:
        """[B, T, N, H] -> [B, blocks, window, N, H], neighbours' frames repeated in the halos."""
        padded = jnp.pad(array_BTNH, ((0, 0), (context, context + tail), (0, 0), (0, 0)))
        places = np.arange(num_blocks)[:, None] * block + np.arange(window)[None, :]
        return padded[:, places]

    query = jnp.pad(query_BTNH, ((0, 0), (0, tail), (0, 0), (0, 0)))
    query = query.reshape(query.shape[0], num_blocks, block, *query.shape[2:])
    scores = query.shape[-1] ** -0.5 * jnp.einsum(
        "BCTNH,BCSNH->BCNTS", query, split(key_BTNH), preferred_element_type=jnp.float32
    )
    # Frame numbers of each block's queries and keys; constants of the compiled program.
    query_frame = np.arange(num_blocks)[:, None] * block + np.arange(block)
    key_frame = np.arange(num_blocks)[:, None] * block + np.arange(window) - context
    near = np.abs(query_frame[:, :, None] - key_frame[:, None, :]) <= context
    exists = (key_frame >= 0) & (key_frame < num_frames)
    # Queries past the end keep their (padded) window, lest their softmax be over nothing.
    visible = near & (exists[:, None, :] | (query_frame[:, :, None] >= num_frames))
    scores = jnp.where(visible[None, :, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value_BTNH.dtype)
    out = jnp.einsum("BCNTS,BCSNH->BCTNH", weights, split(value_BTNH))
    return out.reshape(out.shape[0], num_blocks * block, *out.shape[3:])[:, :num_frames]


def cached_attention(
    query_BTNH: jax.Array, key_BCNH: jax.Array, value_BCNH: jax.Array, first: jax.Array | int
) -> jax.Array:
    """Steps first, first + 1, ... attend to themselves and to what came before.

    Keys and values are a cache of C steps, of which those after the last query are not yet
    written; `first` may be traced. With first = 0 and C = T this is plain causal attention.
    """
    query_step = first + jnp.arange(query_BTNH.shape[1])
    past_TC = jnp.arange(key_BCNH.shape[1])[None, :] <= query_step[:, None]
    scores_BNTC = jnp.where(past_TC[None, None], _scores(query_BTNH, key_BCNH), -jnp.inf)
    weights_BNTC = jax.nn.softmax(scores_BNTC, axis=-1)
    return jnp.einsum("BNTC,BCNH->BTNH", weights_BNTC.astype(value_BCNH.dtype), value_BCNH)


def cross_attention(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
) -> jax.Array:
    """Every frame attends to the text tokens that `text_mask_BS` marks.

    A row without text gives exact zeros. `num_zero_keys_B` adds that many keys of value zero and
    score zero: the reference does not mask the padding of shorter texts in a batch, whose keys are
    zeros, so each of them takes weight exp(0) in the softmax. 0 makes a sample independent of its
    neighbours.
    """
    mask_B1TS = text_mask_BS[:, None, None, :]
    zeros_B111 = num_zero_keys_B.astype(jnp.float32)[:, None, None, None]
    scores_BNTS = _scores(query_BTNH, key_BSNH)
    peak = jnp.max(jnp.where(mask_B1TS, scores_BNTS, -jnp.inf), axis=-1, keepdims=True)
    # The zero keys' score counts towards the peak; a row with no key at all needs a finite one.
    floor = jnp.where((zeros_B111 > 0) | ~mask_B1TS.any(-1, keepdims=True), 0.0, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.maximum(peak, floor))
    # Masked scores are replaced before exp, so that neither values nor gradients can overflow.
    exps = jnp.where(mask_B1TS, jnp.exp(jnp.where(mask_B1TS, scores_BNTS - peak, 0.0)), 0.0)
    total = exps.sum(-1, keepdims=True) + zeros_B111 * jnp.exp(-peak)
    weights_BNTS = exps / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(value_BSNH.dtype), value_BSNH)
