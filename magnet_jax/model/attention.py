"""Attention: over everything, over near frames, over the past, over the past and then in parallel,
and from frames to text.

All functions take and return [batch, length, heads, head size] and compute the softmax in float32.

`self_attention` is the one way in for frames that attend to frames. It has several kernels, equal
up to rounding, of which `choose_kernels` picks by platform and length:

    dense    one score for every pair of frames, far ones masked; the plain statement
    slices   queries in blocks, written out one after another, each with the keys that it can see:
             on TPUs slices of frames are free, where a new axis of blocks would be copied
    blocks   queries in blocks, along an axis of their own with a halo of neighbours' keys; of full
             attention, in a loop
    splash   JAX's Pallas kernel for TPUs, scores never leave the chip's vector memory
    cudnn    NVIDIA's fused kernel, for 16-bit types and full attention
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.config import FullKernel, KernelConfig, LocalKernel, ModelConfig
from magnet_jax.errors import UserError

# Beyond this many frames T x T scores no longer stay in a TPU's vector memory or a CPU's caches.
DENSE_FRAMES = 768
# Queries a block: few where scores cost vector instructions; on GPUs, a block and its halo of 5
# frames to each side fill tiles of 64 keys.
LOCAL_BLOCK = {"cpu": 22, "tpu": 128, "gpu": 54}
FULL_BLOCK = 256
HYBRID_BLOCK = 128
# Where nobody chose.
DEFAULT_LOCAL_BLOCK = 32


def choose_kernels(
    asked: KernelConfig,
    platform: str,
    model: ModelConfig,
    num_frames: int,
    dtype: jnp.dtype,
    *,
    split: bool = False,
) -> KernelConfig:
    """The kernels for this platform ('cpu', 'gpu', 'tpu') and length, those asked for first.

    `num_frames` are on one device; `split` says that others have more of the same clip.

    Raises `UserError` for a kernel that the platform, the model, the precision or a split does not
    have, and for a split so fine that a device's frames see beyond its neighbours.
    """
    if platform not in LOCAL_BLOCK:
        raise UserError(f"JAX runs on {platform}, and this on {', '.join(LOCAL_BLOCK)} only")
    if split and num_frames < model.widest_context:
        raise UserError(
            f"mesh.frames leaves {num_frames} frames a device, fewer than the "
            f"{model.widest_context} seen to each side: use fewer devices, or ask for more seconds"
        )
    if 0 < asked.local_block < 2 * model.widest_context:
        raise UserError(
            f"kernels.local_block {asked.local_block} is below twice the {model.widest_context} "
            "frames that are seen to each side: give a larger one, or 0"
        )
    half = jnp.dtype(dtype).itemsize == 2
    fused = platform == "gpu" and half and model.head_size % 8 == 0 and model.head_size <= 128
    full: FullKernel = asked.full
    local: LocalKernel = asked.local
    if full == "auto" and fused:
        full = "cudnn"
    elif full == "auto" and num_frames <= DENSE_FRAMES:
        full = "dense"
    elif full == "auto":
        full = "slices" if platform == "tpu" else "blocks"
    if local == "auto":
        local = "slices" if platform == "tpu" else "blocks"
    if full == "cudnn" and not fused:
        raise UserError(
            "attention kernel cudnn needs a GPU, bfloat16 and a head size that is a multiple of 8 "
            f"up to 128; here are {platform}, {jnp.dtype(dtype)} and {model.head_size}"
        )
    if "splash" in (full, local) and (platform != "tpu" or split):
        raise UserError(
            "attention kernel splash needs a TPU and all frames on one device (mesh.frames 1)"
        )
    block = asked.local_block or LOCAL_BLOCK[platform]
    return KernelConfig(full=full, local=local, local_block=block)


def self_attention(
    query_BTNH: jax.Array,
    key_BTNH: jax.Array,
    value_BTNH: jax.Array,
    *,
    context: int | None = None,
    kernel: FullKernel | LocalKernel = "auto",
    length: jax.Array | int | None = None,
    axis: str | None = None,
    block: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Every frame attends to every frame, or to those at most `context` frames away (section 3.2).

    Args:
      query_BTNH, key_BTNH, value_BTNH: of T frames each.
      context: frames to each side, as at the stages above 0; None is all frames, as at stage 0.
      kernel: see the module; 'auto' is dense without a context and blocks with one.
      length: frames that exist, a number for all rows or [B] of them; later ones are not attended
        to (and what they themselves attend to is arbitrary, but finite).
      axis: name of the mesh axis over which the frames are split, T of them on each device; then
        `length` counts the frames of all.
      block: queries a block, at least twice the context; 0 is a default. Splash has its own.
      interpret: run a Pallas kernel in Python, on any platform.
    """
    if kernel == "auto":
        kernel = "dense" if context is None else "blocks"
    if not block:
        block = FULL_BLOCK if context is None else DEFAULT_LOCAL_BLOCK
    if axis is not None and length is None:
        raise ValueError("of frames split over devices, the length of the clip must be given")
    if kernel == "splash":
        if axis is not None:
            raise ValueError("splash attention needs all frames on one device")
        return _splash(query_BTNH, key_BTNH, value_BTNH, context, length, interpret)
    keys, first = (key_BTNH, value_BTNH), 0
    if context is not None:
        *keys, first = _with_halo(keys, context, axis)
    elif axis is not None:
        keys = [jax.lax.all_gather(array, axis, axis=1, tiled=True) for array in keys]
    if kernel == "cudnn":
        return _cudnn(query_BTNH, *keys, length)
    if kernel == "blocks" and context is None:
        return _full_in_blocks(query_BTNH, *keys, length, block)
    run = _local_in_blocks if kernel == "blocks" else _in_slices
    block = query_BTNH.shape[1] if kernel == "dense" else block
    return run(query_BTNH, *keys, context, first, length, block)


def with_kernels(kernels: KernelConfig, *, near: bool) -> Callable[..., jax.Array]:
    """`self_attention` by what `choose_kernels` chose, for a stage that sees near frames or all."""
    return functools.partial(
        self_attention,
        kernel=kernels.local if near else kernels.full,
        block=kernels.local_block if near else 0,
    )


def _scores(query_BTNH: jax.Array, key_BSNH: jax.Array) -> jax.Array:
    scale = query_BTNH.shape[-1] ** -0.5
    return scale * jnp.einsum(
        "BTNH,BSNH->BNTS", query_BTNH, key_BSNH, preferred_element_type=jnp.float32
    )


def _exists(
    num_frames: int, halo: int, length: jax.Array | int | None, first: jax.Array | int = 0
) -> jax.Array:
    """Which keys are frames of the clip, [1 or B, halo + T + halo].

    Of T frames, of which the first is frame `first` of a clip of `length` (None: of T), with
    `halo` further ones to both sides.
    """
    frame_1S = (first + jnp.arange(-halo, num_frames + halo))[None]
    length = num_frames if length is None else length
    return (frame_1S >= 0) & (frame_1S < jnp.reshape(jnp.asarray(length), (-1, 1)))


def _dense(
    query_BTNH: jax.Array, key_BSNH: jax.Array, value_BSNH: jax.Array, visible: jax.Array
) -> jax.Array:
    """Softmax over the keys that are visible, [1 or B, S] or [1 or B, T, S]."""
    visible_BNTS = visible[:, None, None] if visible.ndim == 2 else visible[:, None]
    # A finite number, so that a row that sees nothing (past the end of a clip) stays finite.
    scores_BNTS = jnp.where(visible_BNTS, _scores(query_BTNH, key_BSNH), -1e30)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(value_BSNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, value_BSNH)


def _in_slices(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    context: int | None,
    first: jax.Array | int,
    length: jax.Array | int | None,
    block: int,
) -> jax.Array:
    """Attention, `block` queries after another; keys and values as for `_local_in_blocks`."""
    num_frames, halo = query_BTNH.shape[1], context or 0
    exists_BS = _exists(key_BSNH.shape[1] - 2 * halo, halo, length, first)
    parts = []
    for start in range(0, num_frames, block):
        end = min(start + block, num_frames)
        keys = slice(None) if context is None else slice(start, end + 2 * context)
        visible = exists_BS[:, keys]
        if context is not None:
            distance_TS = (
                np.arange(end + 2 * context - start)[None] - np.arange(end - start)[:, None]
            )
            visible = ((distance_TS >= 0) & (distance_TS <= 2 * context))[None] & visible[:, None]
        parts.append(
            _dense(query_BTNH[:, start:end], key_BSNH[:, keys], value_BSNH[:, keys], visible)
        )
    return jnp.concatenate(parts, axis=1)


def _full_in_blocks(query_BTNH, key_BSNH, value_BSNH, length, block: int) -> jax.Array:
    """Full attention, `block` queries at a time: scores of all pairs are never there at once."""
    batch, num_frames, *heads = query_BTNH.shape
    block = min(block, num_frames)
    num_blocks = -(-num_frames // block)
    exists_BS = _exists(key_BSNH.shape[1], 0, length)
    tail = num_blocks * block - num_frames
    query = jnp.pad(query_BTNH, ((0, 0), (0, tail), (0, 0), (0, 0)))
    query_CBTNH = jnp.moveaxis(query.reshape(batch, num_blocks, block, *heads), 1, 0)
    out_CBTNH = jax.lax.map(lambda q: _dense(q, key_BSNH, value_BSNH, exists_BS), query_CBTNH)
    out = jnp.moveaxis(out_CBTNH, 0, 1).reshape(batch, num_blocks * block, *heads)
    return out[:, :num_frames]


def _with_halo(
    arrays: tuple[jax.Array, ...], context: int, axis: str | None
) -> tuple[jax.Array, ...]:
    """[B, T, ...] -> [B, context + T + context, ...], and the number of the first of the T frames.

    On one device the halo is zeros; where frames are split over a mesh axis it is the neighbours'
    frames, and zeros at both ends.
    """
    if axis is None:
        pads = [(0, 0), (context, context), (0, 0), (0, 0)]
        return *(jnp.pad(array, pads) for array in arrays), 0
    size, num_frames = jax.lax.axis_size(axis), arrays[0].shape[1]
    up, down = ([(i, i + 1) for i in range(size - 1)], [(i + 1, i) for i in range(size - 1)])
    # Keys and values travel together: two messages a layer.
    both = jnp.stack(arrays)
    before = jax.lax.ppermute(both[:, :, num_frames - context :], axis, up)
    after = jax.lax.ppermute(both[:, :, :context], axis, down)
    whole = jnp.concatenate([before, both, after], axis=2)
    return *whole, jax.lax.axis_index(axis) * num_frames


def _local_in_blocks(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    context: int,
    first: jax.Array | int,
    length: jax.Array | int | None,
    block: int,
) -> jax.Array:
    """Local attention in blocks of queries, each with the keys of its own frames and of a halo.

    Keys and values have `context` more frames to both sides.
    """
    batch, num_frames, *heads = query_BTNH.shape
    block = max(min(block, num_frames), 2 * context)
    num_blocks = -(-num_frames // block)
    window = block + 2 * context

    def windows(array_BSNH: jax.Array) -> jax.Array:
        """[B, S, N, H] -> [B, blocks, window, N, H]: a block and the start of the next."""
        short = (num_blocks + 1) * block - array_BSNH.shape[1]
        padded = jnp.pad(array_BSNH, ((0, 0), (0, short), (0, 0), (0, 0)))
        own = padded[:, :-block].reshape(batch, num_blocks, block, *heads)
        following = padded[:, block:].reshape(batch, num_blocks, block, *heads)
        return jnp.concatenate([own, following[:, :, : 2 * context]], axis=2)

    tail = num_blocks * block - num_frames
    query = jnp.pad(query_BTNH, ((0, 0), (0, tail), (0, 0), (0, 0)))
    query = query.reshape(batch, num_blocks, block, *heads)
    scores = query.shape[-1] ** -0.5 * jnp.einsum(
        "BCTNH,BCSNH->BCNTS", query, windows(key_BSNH), preferred_element_type=jnp.float32
    )
    # Places within the window; both are constants of the compiled program.
    distance_TS = np.arange(window)[None, :] - np.arange(block)[:, None]
    near_TS = (distance_TS >= 0) & (distance_TS <= 2 * context)
    if length is None and isinstance(first, int):  # constants of the program
        frame_CS = np.arange(num_blocks)[:, None] * block + np.arange(window)[None] - context
        exists_BCS = ((frame_CS >= 0) & (frame_CS < num_frames))[None]
    else:
        exists_BS = _exists(num_frames, context, length, first)
        short = num_blocks * block + 2 * context - exists_BS.shape[1]
        places_CS = np.arange(num_blocks)[:, None] * block + np.arange(window)[None]
        exists_BCS = jnp.pad(exists_BS, ((0, 0), (0, short)))[:, places_CS]
    visible = near_TS[None, None, None] & exists_BCS[:, :, None, None]
    scores = jnp.where(visible, scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value_BSNH.dtype)
    out = jnp.einsum("BCNTS,BCSNH->BCTNH", weights, windows(value_BSNH))
    return out.reshape(batch, num_blocks * block, *heads)[:, :num_frames]


def _cudnn(query_BTNH, key_BSNH, value_BSNH, length) -> jax.Array:
    lengths_B = None
    if length is not None:
        lengths_B = jnp.broadcast_to(jnp.asarray(length, jnp.int32), (len(query_BTNH),))
    return jax.nn.dot_product_attention(
        query_BTNH, key_BSNH, value_BSNH, key_value_seq_lengths=lengths_B, implementation="cudnn"
    )


def _splash(
    query_BTNH, key_BSNH, value_BSNH, context: int | None, length, interpret: bool
) -> jax.Array:
    """Splash attention; frames are padded to whole blocks of 128 and kept apart by segment ids."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    num_heads, head_size = query_BTNH.shape[2:]
    queries, keys = (_whole_blocks(x.shape[1]) for x in (query_BTNH, key_BSNH))
    if context is None:
        mask = splash.FullMask((queries, keys))
    else:
        mask = splash.LocalMask((queries, keys), (context, context), 0)
    block_q, block_kv = math.gcd(queries, 512), math.gcd(keys, 512)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(block_q=block_q, block_kv=block_kv),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    batch, num_frames = query_BTNH.shape[:2]
    length_B1 = jnp.broadcast_to(
        jnp.reshape(jnp.asarray(key_BSNH.shape[1] if length is None else length), (-1, 1)),
        (batch, 1),
    )
    # Frames past the end are a segment of their own, so that nothing sees them and yet each of them
    # sees something near. Without a context all queries see what exists.
    segments_BS = (jnp.arange(keys)[None] >= length_B1).astype(jnp.int32)
    segments_BT = jnp.zeros((batch, queries), jnp.int32) if context is None else segments_BS

    def heads_first(x_BTNH: jax.Array, length: int) -> jax.Array:
        pads = ((0, 0), (0, length - x_BTNH.shape[1]), (0, 0), (0, 0))
        return jnp.swapaxes(jnp.pad(x_BTNH, pads), 1, 2)

    out_BNTH = jax.vmap(kernel)(
        heads_first(query_BTNH * head_size**-0.5, queries),
        heads_first(key_BSNH, keys),
        heads_first(value_BSNH, keys),
        splash.SegmentIds(segments_BT, segments_BS),
    )
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :num_frames].astype(value_BSNH.dtype)


def _whole_blocks(num_frames: int) -> int:
    return -(-num_frames // 128) * 128


def causal_attention(
    query_BTNH: jax.Array, key_BTNH: jax.Array, value_BTNH: jax.Array, *, block: int = FULL_BLOCK
) -> jax.Array:
    """T steps attend to themselves and to those before.

    `block` queries one after another, each with the keys up to its end: about half of the scores
    are left out, and those of all pairs are never there at once.
    """
    parts = []
    for start in range(0, query_BTNH.shape[1], block):
        end = min(start + block, query_BTNH.shape[1])
        past_TS = np.arange(end)[None] <= np.arange(start, end)[:, None]
        past = (x_BTNH[:, :end] for x_BTNH in (key_BTNH, value_BTNH))
        parts.append(_dense(query_BTNH[:, start:end], *past, jnp.asarray(past_TS)[None]))
    return jnp.concatenate(parts, axis=1)


def _beside_past(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    past_BNCH: tuple[jax.Array, jax.Array],
    past_visible_C: jax.Array | None,
    visible_1TS: jax.Array,
) -> jax.Array:
    """One softmax over a cache, of which all or what is `past_visible_C`, and over other keys."""
    past_key, past_value = past_BNCH
    past_BNTC = query_BTNH.shape[-1] ** -0.5 * jnp.einsum(
        "BTNH,BNCH->BNTC", query_BTNH, past_key, preferred_element_type=jnp.float32
    )
    if past_visible_C is not None:
        past_BNTC = jnp.where(past_visible_C[None, None, None], past_BNTC, -1e30)
    own_BNTS = jnp.where(visible_1TS[:, None], _scores(query_BTNH, key_BSNH), -1e30)
    weights = jax.nn.softmax(jnp.concatenate([past_BNTC, own_BNTS], axis=-1), axis=-1)
    weights = weights.astype(value_BSNH.dtype)
    past_BNTC, own_BNTS = jnp.split(weights, [past_key.shape[2]], axis=-1)
    return jnp.einsum("BNTC,BNCH->BTNH", past_BNTC, past_value) + jnp.einsum(
        "BNTS,BSNH->BTNH", own_BNTS, value_BSNH
    )


def cached_attention(
    query_BTNH: jax.Array,
    key_BTNH: jax.Array,
    value_BTNH: jax.Array,
    past_BNCH: tuple[jax.Array, jax.Array],
    first: jax.Array | int,
) -> jax.Array:
    """Steps first, first + 1, ... attend to those before them in a cache, and among themselves.

    Keys and values of earlier steps are in a cache of C steps, of which those from `first` on are
    not yet written. `first` may be traced; where it is 0, there is no past.
    """
    if isinstance(first, int) and first == 0:
        return causal_attention(query_BTNH, key_BTNH, value_BTNH)
    step_T = jnp.arange(query_BTNH.shape[1])
    written_C = jnp.arange(past_BNCH[0].shape[2]) < first
    causal_1TS = (step_T[None] <= step_T[:, None])[None]
    return _beside_past(query_BTNH, key_BTNH, value_BTNH, past_BNCH, written_C, causal_1TS)


def completing_attention(
    query_BTNH: jax.Array,
    key_BTNH: jax.Array,
    value_BTNH: jax.Array,
    past_BNCH: tuple[jax.Array, jax.Array],
    *,
    context: int | None,
    delay: jax.Array | int,
    most_delay: int,
    length: jax.Array | int,
) -> jax.Array:
    """`hybrid_attention` of the steps after a prompt, whose keys and values are a cache.

    All of the cache is seen, and of the T steps those of the mask, computed in blocks of queries
    with the keys that they can see. Steps from `length` on do not exist. `delay` may be traced;
    `most_delay` is the greatest that may come.
    """
    num_steps = query_BTNH.shape[1]
    block = FULL_BLOCK if context is None else HYBRID_BLOCK
    parts = []
    for start in range(0, num_steps, block):
        end = min(start + block, num_steps)
        low, high = 0, num_steps
        if context is not None:
            low, high = max(start - context - most_delay, 0), min(end + context, num_steps)
        key_1S, query_T1 = jnp.arange(low, high)[None], jnp.arange(start, end)[:, None]
        visible_TS = jnp.broadcast_to(key_1S < length, (end - start, high - low))
        if context is not None:
            ahead_TS = key_1S - query_T1
            visible_TS &= (ahead_TS >= -(context + delay)) & (ahead_TS <= context)
        near = (x_BTNH[:, low:high] for x_BTNH in (key_BTNH, value_BTNH))
        query = query_BTNH[:, start:end]
        parts.append(_beside_past(query, *near, past_BNCH, None, visible_TS[None]))
    return jnp.concatenate(parts, axis=1)


def hybrid_attention(
    query_BTNH: jax.Array,
    key_BTNH: jax.Array,
    value_BTNH: jax.Array,
    first_B: jax.Array,
    *,
    context: int | None,
    delay: jax.Array | int,
    block: int = HYBRID_BLOCK,
) -> jax.Array:
    """The attention of hybrid training (Appendix E), one mask for both halves of a sequence.

    Steps before `first_B` attend to themselves and to those before them. Steps from there on attend
    to all steps before `first_B`; of the others, to all (`context` None), or from `context + delay`
    steps back to `context` ahead: `hybrid_objective.py` says why.

    The mask is a comparison of step numbers, made for `block` queries at a time. The backward pass
    makes scores anew, so that those of all pairs are never there at once. `first_B` is at least 1.
    """
    batch, num_steps, *heads = query_BTNH.shape
    block = min(block, num_steps)
    num_blocks = -(-num_steps // block)
    tail = num_blocks * block - num_steps
    query = jnp.pad(query_BTNH, ((0, 0), (0, tail), (0, 0), (0, 0)))
    query_CBTNH = jnp.moveaxis(query.reshape(batch, num_blocks, block, *heads), 1, 0)
    key_11S = jnp.arange(num_steps)[None, None]
    first_B11 = first_B[:, None, None]

    @jax.checkpoint
    def attend(query_BTNH: jax.Array, start: jax.Array) -> jax.Array:
        query_1T1 = start + jnp.arange(block)[None, :, None]
        near_1TS = jnp.ones((1, block, num_steps), bool)
        if context is not None:
            ahead_1TS = key_11S - query_1T1
            near_1TS = (ahead_1TS >= -(context + delay)) & (ahead_1TS <= context)
        prompt_B1S = key_11S < first_B11
        visible = jnp.where(query_1T1 < first_B11, key_11S <= query_1T1, prompt_B1S | near_1TS)
        return _dense(query_BTNH, key_BTNH, value_BTNH, visible)

    starts_C = jnp.arange(num_blocks) * block
    out_CBTNH = jax.lax.map(lambda inputs: attend(*inputs), (query_CBTNH, starts_C))
    out = jnp.moveaxis(out_CBTNH, 0, 1).reshape(batch, num_blocks * block, *heads)
    return out[:, :num_steps]


def cross_attention(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    zero_11NH: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Every frame attends to the text tokens that `text_mask_BS` marks.

    A row without text gives exact zeros. `num_zero_keys_B` adds that many keys of value zero and
    score zero: the reference does not mask the padding of shorter texts in a batch, whose keys are
    zeros, so each of them takes weight exp(0) in the softmax. 0 makes a sample independent of its
    neighbours.

    `zero_11NH` are the key and value of padding where biases or norms make them other than zeros.
    A row without text then attends to padding alone, as in the reference, and gives its value.
    """
    if zero_11NH is not None:
        return _attention_to_padded(
            query_BTNH, key_BSNH, value_BSNH, text_mask_BS, num_zero_keys_B, zero_11NH
        )
    mask_B1TS = text_mask_BS[:, None, None, :]
    zeros_B111 = num_zero_keys_B.astype(jnp.float32)[:, None, None, None]
    scores_BNTS = _scores(query_BTNH, key_BSNH)
    peak = jnp.max(jnp.where(mask_B1TS, scores_BNTS, -jnp.inf), axis=-1, keepdims=True)
    # The zero keys' score counts towards the peak; a row with no key at all needs a finite one.
    floor = jnp.where((zeros_B111 > 0) | ~mask_B1TS.any(-1, keepdims=True), 0.0, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.maximum(peak, floor))
    # Masked scores are replaced before exp, so that neither values nor gradients can overflow.
    exps = jnp.where(mask_B1TS, jnp.exp(jnp.where(mask_B1TS, scores_BNTS - peak, 0.0)), 0.0)
    total = exps.sum(-1, keepdims=True) + zeros_B111 * jnp.exp(-jnp.maximum(peak, 0.0))
    weights_BNTS = exps / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(value_BSNH.dtype), value_BSNH)


def _attention_to_padded(
    query_BTNH, key_BSNH, value_BSNH, text_mask_BS, num_zero_keys_B, zero_11NH
) -> jax.Array:
    """`cross_attention` where padding has a key and a value: one key more, counted so often."""
    key, value = (
        jnp.concatenate([x_BSNH, jnp.broadcast_to(zero, x_BSNH[:, :1].shape)], axis=1)
        for x_BSNH, zero in zip((key_BSNH, value_BSNH), zero_11NH, strict=True)
    )
    num_zeros_B = jnp.maximum(num_zero_keys_B, ~text_mask_BS.any(-1))
    count_BS = jnp.concatenate([text_mask_BS, num_zeros_B[:, None]], axis=1).astype(jnp.float32)
    count_B11S = count_BS[:, None, None]
    # Equal keys, n of them, weigh as one whose score is log(n) higher.
    scores_BNTS = _scores(query_BTNH, key) + jnp.log(jnp.maximum(count_B11S, 1))
    weights_BNTS = jax.nn.softmax(jnp.where(count_B11S > 0, scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(value.dtype), value)
