"""Self-attention by kernels that are equal up to rounding, of which `choose_kernels` picks one.

    dense    one score for every pair of frames, far ones masked; the plain statement
    slices   queries in blocks, written out one after another, each with the keys that it can see:
             on TPUs slices of frames are free, where a new axis of blocks would be copied
    blocks   queries in blocks, along an axis of their own with a halo of neighbours' keys; of full
             attention, in a loop
    splash   JAX's Pallas kernel for TPUs, scores never leave the chip's vector memory
    chunks   of training on TPUs, full attention: see chunks.py
    cudnn    NVIDIA's fused kernel, for 16-bit types and full attention

docs/performance.md has the measurements behind the choice.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from magnet_jax.config import FullKernel, KernelConfig, LocalKernel, ModelConfig, require
from magnet_jax.model import chunks
from magnet_jax.model.attention import BLOCK, dense, existing, in_blocks, kept, near, slices

# Beyond this many frames T x T scores no longer stay in a TPU's vector memory or a CPU's caches.
DENSE_FRAMES = 768
# Queries a block: few where scores cost vector instructions; on GPUs, a block and its halo of 5
# frames to each side fill tiles of 64 keys.
LOCAL_BLOCK = {"cpu": 22, "tpu": 128, "gpu": 54}


def choose_kernels(
    asked: KernelConfig,
    platform: str,
    model: ModelConfig,
    num_frames: int,
    dtype: jnp.dtype,
    *,
    split: bool = False,
    trained: bool = False,
) -> KernelConfig:
    """The kernels for this platform ('cpu', 'gpu', 'tpu') and length, those asked for first.

    `num_frames` are on one device; `split` says that others have more of the same clip, `trained`
    that gradients are wanted, and all frames exist.

    Raises `UserError` for a kernel that the platform, the model, the precision or a split does not
    have, and for a split so fine that a device's frames see beyond its neighbours.
    """
    known = ", ".join(LOCAL_BLOCK)
    require((platform in LOCAL_BLOCK, f"JAX runs on {platform}, and this on {known} only"))
    half = jnp.dtype(dtype).itemsize == 2
    fused = platform == "gpu" and half and model.head_size % 8 == 0 and model.head_size <= 128
    in_parts = "slices" if platform == "tpu" else "blocks"
    full, local = asked.full, asked.local
    if full == "auto":
        full = "cudnn" if fused else "dense" if num_frames <= DENSE_FRAMES else in_parts
        if trained and platform == "tpu":
            full = "chunks"
    if local == "auto":
        local = in_parts
    require(
        (
            not split or num_frames >= model.widest_context,
            f"mesh.frames leaves {num_frames} frames a device, fewer than the "
            f"{model.widest_context} seen to each side: use fewer devices, or ask for more seconds",
        ),
        (
            not 0 < asked.local_block < 2 * model.widest_context,
            f"kernels.local_block {asked.local_block} is below twice the {model.widest_context} "
            "frames that are seen to each side: give a larger one, or 0",
        ),
        (
            full != "cudnn" or fused,
            "attention kernel cudnn needs a GPU, bfloat16 and a head size that is a multiple of 8 "
            f"up to 128; here are {platform}, {jnp.dtype(dtype)} and {model.head_size}",
        ),
        (
            full != "chunks" or (trained and platform == "tpu"),
            "attention kernel chunks is for training on TPUs: leave it out",
        ),
        (
            "splash" not in (full, local) or (platform == "tpu" and not split),
            "attention kernel splash needs a TPU and all frames on one device (mesh.frames 1)",
        ),
    )
    # No frame lies in more than two windows of neighbouring blocks (`_windows_backward`).
    block = asked.local_block or max(LOCAL_BLOCK[platform], 2 * model.widest_context)
    return KernelConfig(full=full, local=local, local_block=block)


def with_kernels(
    kernels: KernelConfig, *, near: bool, mesh: Mesh | None = None
) -> Callable[..., jax.Array]:
    """`attend` as `choose_kernels` chose, for near frames or all; `mesh` is that of training."""
    if near:
        return functools.partial(attend, kernel=kernels.local, block=kernels.local_block)
    if kernels.full == "chunks":
        return lambda *qkv_BTNH, context: chunks.attention(mesh, *qkv_BTNH)
    return functools.partial(attend, kernel=kernels.full)


def attend(
    query_BTNH: jax.Array,
    key_BTNH: jax.Array,
    value_BTNH: jax.Array,
    *,
    kernel: FullKernel | LocalKernel,
    context: int | None = None,
    length: jax.Array | int | None = None,
    axis: str | None = None,
    around: jax.Array | int | None = None,
    block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """`attention.self_attention`, whose arguments have the same meaning, by a kernel.

    Args:
      kernel: see the module; not 'auto'.
      axis: name of the mesh axis over which the frames are split, T of them on each device; then
        `length`, which must be given, counts the frames of all.
      around: frames of a ring, of which the last is before the first; those of the T frames that
        are beyond it give anything. It needs a context, and goes in place of `length`.
      block: queries a block, at least twice the context. Splash has its own.
      interpret: run a Pallas kernel in Python, on any platform.
    """
    if axis is not None and (length is None or kernel == "splash"):
        raise ValueError("frames split over devices need the clip's length, and another kernel")
    if around is not None and (context is None or axis is not None or kernel == "splash"):
        raise ValueError("a ring needs a context, all frames on one device, and another kernel")
    if kernel == "splash":
        return _splash(query_BTNH, key_BTNH, value_BTNH, context, length, interpret)
    first, keys = 0, (key_BTNH, value_BTNH)
    if around is not None:
        place_S = (jnp.arange(key_BTNH.shape[1] + 2 * context) - context) % around
        first, length, keys = context, around + 2 * context, [x[:, place_S] for x in keys]
    elif context is not None:
        first, *keys = _with_halo(keys, context, axis)
    elif axis is not None:
        keys = [jax.lax.all_gather(array, axis, axis=1, tiled=True) for array in keys]
    if kernel == "cudnn":
        return _cudnn(query_BTNH, *keys, length)
    if length is None:
        length = key_BTNH.shape[1]
    elif jnp.ndim(length):
        length = length[:, None, None]
    if kernel == "dense":
        block = query_BTNH.shape[1]
    if kernel != "blocks":
        return _in_slices(query_BTNH, *keys, context, first, length, block)
    if context is not None:
        return _local_in_blocks(query_BTNH, *keys, context, first, length, block)
    exists_B1S = existing(np.arange(keys[0].shape[1])[None, None], length)
    return in_blocks(lambda query, _: dense(query, *keys, exists_B1S), query_BTNH, block)


def _with_halo(
    arrays: tuple[jax.Array, ...], context: int, axis: str | None
) -> tuple[jax.Array | int, ...]:
    """The number of the first of the T frames, and [B, T, ...] -> [B, context + T + context, ...].

    On one device the halo is zeros; where frames are split over a mesh axis it is the neighbours'
    frames, and zeros at both ends.
    """
    if axis is None:
        pads = [(0, 0), (context, context), (0, 0), (0, 0)]
        return 0, *(jnp.pad(array, pads) for array in arrays)
    size, num_frames = jax.lax.axis_size(axis), arrays[0].shape[1]
    up, down = ([(i, i + 1) for i in range(size - 1)], [(i + 1, i) for i in range(size - 1)])
    # Keys and values travel together: two messages a layer.
    both = jnp.stack(arrays)
    before = jax.lax.ppermute(both[:, :, num_frames - context :], axis, up)
    after = jax.lax.ppermute(both[:, :, :context], axis, down)
    return jax.lax.axis_index(axis) * num_frames, *jnp.concatenate([before, both, after], axis=2)


@kept
def _in_slices(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    context: int | None,
    first: jax.Array | int,
    length: jax.Array | int,
    block: int,
) -> jax.Array:
    """Attention, `block` queries after another; keys and values as for `_local_in_blocks`."""
    halo, parts = context or 0, []
    blocks = tuple(slices(query_BTNH.shape[1], block))
    queries = windows(query_BTNH, blocks)
    if context is None:
        seen = ((0, key_BSNH.shape[1]),) * len(blocks)
        keys, values = (key_BSNH,) * len(blocks), (value_BSNH,) * len(blocks)
    else:
        seen = tuple((start, end + 2 * halo) for start, end in blocks)
        keys, values = windows(key_BSNH, seen), windows(value_BSNH, seen)
    for (start, end), (low, high), *qkv in zip(blocks, seen, queries, keys, values):
        query_1T1 = np.arange(start, end)[None, :, None]
        key_11S = np.arange(low, high)[None, None] - halo
        visible_BTS = near(query_1T1, key_11S, context) & existing(first + key_11S, length)
        parts.append(dense(*qkv, visible_BTS))
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def windows(x_BTNH: jax.Array, bounds: tuple[tuple[int, int], ...]) -> tuple[jax.Array, ...]:
    """Frames from each start to each end: all of them in turn, some in two windows.

    The gradient is put together piece by piece, where JAX's own adds a whole array a window.
    """
    return tuple(x_BTNH[:, start:end] for start, end in bounds)


def _windows_forward(x_BTNH, bounds):
    return windows(x_BTNH, bounds), None


def _windows_backward(bounds, _, grads):
    pieces, shared = [], 0.0
    next_starts = [start for start, _ in bounds[1:]] + [bounds[-1][1]]
    overlap = 0  # with the window before
    for grad, (start, end), next_start in zip(grads, bounds, next_starts):
        if overlap:
            pieces.append(shared + grad[:, :overlap])
        pieces.append(grad[:, overlap : next_start - start])
        shared, overlap = grad[:, next_start - start :], end - next_start
    return (jnp.concatenate(pieces, axis=1),)


windows.defvjp(_windows_forward, _windows_backward)


@kept
def _local_in_blocks(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    context: int,
    first: jax.Array | int,
    length: jax.Array | int,
    block: int,
) -> jax.Array:
    """Local attention in blocks of queries, each with the keys of its own frames and of a halo.

    Keys and values have `context` more frames to both sides. The first of the T frames is frame
    `first` of a clip of `length`.
    """
    batch, num_frames, *heads = query_BTNH.shape
    block = max(min(block, num_frames), 2 * context)
    num_blocks = -(-num_frames // block)
    window = block + 2 * context

    def whole_blocks(array: jax.Array, count: int) -> jax.Array:
        short = count * block - array.shape[1]
        return jnp.pad(array, ((0, 0), (0, short), (0, 0), (0, 0)))

    def windows(array_BSNH: jax.Array) -> jax.Array:
        """[B, S, N, H] -> [B, blocks, window, N, H]: a block and the start of the next."""
        padded = whole_blocks(array_BSNH, num_blocks + 1)
        own = padded[:, :-block].reshape(batch, num_blocks, block, *heads)
        following = padded[:, block:].reshape(batch, num_blocks, block, *heads)
        return jnp.concatenate([own, following[:, :, : 2 * context]], axis=2)

    query_BCTNH = whole_blocks(query_BTNH, num_blocks).reshape(batch, num_blocks, block, *heads)
    query_11T1 = np.arange(block)[None, None, :, None]
    key_111S = np.arange(window)[None, None, None] - context
    start_1C11 = np.arange(num_blocks)[None, :, None, None] * block
    length = length[:, None] if jnp.ndim(length) else length
    exists_BC1S = existing(first + start_1C11 + key_111S, length)
    visible_BCTS = near(query_11T1, key_111S, context) & exists_BC1S
    out = dense(query_BCTNH, windows(key_BSNH), windows(value_BSNH), visible_BCTS)
    return out.reshape(batch, -1, *heads)[:, :num_frames]


def _cudnn(query_BTNH, key_BSNH, value_BSNH, length) -> jax.Array:
    lengths_B = None
    if length is not None:
        lengths_B = jnp.broadcast_to(jnp.asarray(length, jnp.int32), (len(query_BTNH),))
    return jax.nn.dot_product_attention(
        query_BTNH, key_BSNH, value_BSNH, key_value_seq_lengths=lengths_B, implementation="cudnn"
    )


@kept
def _splash(
    query_BTNH, key_BSNH, value_BSNH, context: int | None, length, interpret: bool
) -> jax.Array:
    """Splash attention; frames are padded to whole blocks of 128 and kept apart by segment ids."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    batch, num_frames, num_heads, head_size = query_BTNH.shape
    padded = -(-num_frames // 128) * 128
    if context is None:
        mask = splash.FullMask((padded, padded))
    else:
        mask = splash.LocalMask((padded, padded), (context, context), 0)
    block = math.gcd(padded, 512)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # Frames past the end are a segment of their own, so that nothing sees them and yet each of them
    # sees something near. Without a context all queries see what exists.
    length_B1 = jnp.reshape(num_frames if length is None else length, (-1, 1))
    past_BS = (jnp.arange(padded)[None] >= length_B1).astype(jnp.int32)
    past_BS = jnp.broadcast_to(past_BS, (batch, padded))
    segments = splash.SegmentIds(jnp.zeros_like(past_BS) if context is None else past_BS, past_BS)

    def heads_first(x_BTNH: jax.Array) -> jax.Array:
        pads = ((0, 0), (0, padded - num_frames), (0, 0), (0, 0))
        return jnp.swapaxes(jnp.pad(x_BTNH, pads), 1, 2)

    arrays = (heads_first(x) for x in (query_BTNH * head_size**-0.5, key_BSNH, value_BSNH))
    out_BNTH = jax.vmap(kernel)(*arrays, segments)
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :num_frames].astype(value_BSNH.dtype)
