"""Full attention of training on TPUs, and its gradient, in chunks of clips and heads.

A chunk is so small that its T x T scores stay in the chip's vector memory, forward and backward.
What the backward pass keeps is the output and, for each query, the logarithm of the softmax's sum.
The barriers are there so that XLA makes each array of scores once, and whatever is derived from it
within the product that takes it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from magnet_jax.model.attention import ATTENDED, STATISTICS, scores

# Bytes of the two float32 arrays of scores that the backward pass has at once. A v5e has 128 MiB of
# vector memory.
SCORE_BYTES = 72_000_000


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    mesh: Mesh, query_BTNH: jax.Array, key_BTNH: jax.Array, value_BTNH: jax.Array
) -> jax.Array:
    """`attention.self_attention` over all frames.

    `mesh` is that of training: clips are split over data and fsdp, heads over tensor.
    """
    return _forward(mesh, query_BTNH, key_BTNH, value_BTNH)[0]


def _forward(mesh, query_BTNH, key_BTNH, value_BTNH):
    given = query_BTNH, key_BTNH, value_BTNH
    out, log_sum = _over_chunks(mesh, _forward_of_chunk, given)
    out, log_sum = checkpoint_name(out, ATTENDED), checkpoint_name(log_sum, STATISTICS)
    return out, (*given, out, log_sum)


def _backward(mesh, kept, grad_BTNH):
    return _over_chunks(mesh, _backward_of_chunk, (*kept, grad_BTNH))


attention.defvjp(_forward, _backward)


def _forward_of_chunk(query_BTNH, key_BSNH, value_BSNH) -> tuple[jax.Array, jax.Array]:
    """What is attended, and the logarithms of the sums [B, 1, N, T]."""
    scores_BNTS = scores(query_BTNH, key_BSNH)
    peak_BNT1 = scores_BNTS.max(-1, keepdims=True)
    scores_BNTS, peak_BNT1 = jax.lax.optimization_barrier((scores_BNTS, peak_BNT1))
    exps_BNTS = jnp.exp(scores_BNTS - peak_BNT1).astype(value_BSNH.dtype)
    # The sum is one more column of the product, which a matrix unit has to spare.
    with_ones = jnp.concatenate([value_BSNH, jnp.ones_like(value_BSNH[..., :1])], -1)
    both = jnp.einsum("BNTS,BSNH->BTNH", exps_BNTS, with_ones, preferred_element_type=jnp.float32)
    out_BTNH, sum_BTN = both[..., :-1], both[..., -1]
    log_sum_BNT = peak_BNT1[..., 0] + jnp.log(jnp.swapaxes(sum_BTN, 1, 2))
    return (out_BTNH / sum_BTN[..., None]).astype(value_BSNH.dtype), log_sum_BNT[:, None]


def _backward_of_chunk(
    query_BTNH, key_BSNH, value_BSNH, out_BTNH, log_sum_B1NT, grad_BTNH
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value."""
    dtype, log_sum_BNT1 = query_BTNH.dtype, log_sum_B1NT[:, 0, :, :, None]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    grad_out = grad_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    mean_BNT1 = jnp.swapaxes(grad_out.sum(-1), 1, 2)[..., None]
    scores_BNTS = scores(query_BTNH, key_BSNH)
    of_weights_BNTS = product("BTNH,BSNH->BNTS", grad_BTNH, value_BSNH)
    kept = scores_BNTS, of_weights_BNTS, mean_BNT1, log_sum_BNT1

    def of_scores(scores_BNTS, of_weights_BNTS, mean_BNT1, log_sum_BNT1):
        weights_BNTS = jnp.exp(scores_BNTS - log_sum_BNT1)
        return (weights_BNTS * (of_weights_BNTS - mean_BNT1)).astype(dtype)

    kept = jax.lax.optimization_barrier(kept)
    weights_BNTS = jnp.exp(kept[0] - kept[3]).astype(dtype)
    grad_value = jnp.einsum("BNTS,BTNH->BSNH", weights_BNTS, grad_BTNH)
    grad_query = product("BNTS,BSNH->BTNH", of_scores(*kept), key_BSNH)
    # Made a second time, for the product with queries to have it as its own operand.
    *kept, grad_query = jax.lax.optimization_barrier((*kept, grad_query))
    grad_key = product("BNTS,BTNH->BSNH", of_scores(*kept), query_BTNH)
    scale = query_BTNH.shape[-1] ** -0.5
    return (scale * grad_query).astype(dtype), (scale * grad_key).astype(dtype), grad_value


def _over_chunks(mesh: Mesh, run: Callable, arrays: tuple[jax.Array, ...]) -> tuple:
    """`run` on one chunk of a device's clips and heads after another; heads are the third axis."""

    def on_device(*arrays: jax.Array) -> tuple:
        batch, num_frames, num_heads, _ = arrays[0].shape
        clips, heads = _chunk(batch, num_frames, num_heads)

        def split(x_BTNH: jax.Array) -> jax.Array:
            b, t, n, h = x_BTNH.shape
            x = x_BTNH.reshape(b // clips, clips, t, n // heads, heads, h)
            return jnp.moveaxis(x, 3, 1).reshape(-1, clips, t, heads, h)

        def join(x_CBTNH: jax.Array) -> jax.Array:
            _, _, t, _, h = x_CBTNH.shape
            x = x_CBTNH.reshape(batch // clips, num_heads // heads, clips, t, heads, h)
            return jnp.moveaxis(x, 1, 3).reshape(batch, t, num_heads, h)

        out = jax.lax.map(lambda chunk: run(*chunk), tuple(map(split, arrays)))
        return jax.tree.map(join, out)

    if mesh.size == 1:
        return on_device(*arrays)
    spec = P(("data", "fsdp"), None, "tensor")
    split_up = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return split_up(*arrays)


def _chunk(batch: int, num_frames: int, num_heads: int) -> tuple[int, int]:
    """Clips and heads of a chunk: divisors of what there is, with as many scores as have room."""
    room = max(SCORE_BYTES // (2 * 4 * num_frames**2), 1)

    def largest_divisor(number: int, most: int) -> int:
        return next(n for n in range(min(number, most), 0, -1) if number % n == 0)

    heads = largest_divisor(num_heads, room)
    return largest_divisor(batch, room // heads) if heads == num_heads else 1, heads
