"""What attends to what: masks, and attention by them.

A mask is a function of the numbers of queries and keys, integer arrays [1, T, 1] and [1, 1, S] as a
rule, and is True where a key is seen. Attention takes and returns [batch, length, heads, head size]
and computes the softmax in float32. How frames attend to frames fast is in kernels.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256  # queries a block
HYBRID_BLOCK = 128


# --- masks ---


def existing(key: jax.Array, length: jax.Array | int) -> jax.Array:
    """Keys of a clip of `length` frames, which is a number or [B, 1, 1] of them."""
    return (key >= 0) & (key < length)


def near(
    query: jax.Array, key: jax.Array, context: int | None, delay: jax.Array | int = 0
) -> jax.Array:
    """Keys from `context + delay` before a query to `context` after it (section 3.2).

    None is all keys, as at stage 0. The delay is that of a hybrid's codebook, whose frame is so
    many steps later: `hybrid_objective.py` says why.
    """
    if context is None:
        return np.ones(key.shape, bool)
    ahead = key - query
    return (ahead >= -(context + delay)) & (ahead <= context)


def causal(query: jax.Array, key: jax.Array) -> jax.Array:
    """A query's own key, and those before it."""
    return key <= query


def hybrid(
    query: jax.Array,
    key: jax.Array,
    first: jax.Array,
    context: int | None,
    delay: jax.Array | int,
) -> jax.Array:
    """Appendix E: steps before `first` are causal; those from there on see these, and near ones."""
    return jnp.where(
        query < first, causal(query, key), (key < first) | near(query, key, context, delay)
    )


# --- attention ---


def dense(
    query_BTNH: jax.Array, key_BSNH: jax.Array, value_BSNH: jax.Array, visible_BTS: jax.Array
) -> jax.Array:
    """Softmax over the keys that are visible; there may be further batch axes.

    All axes of `visible_BTS` but the last may be 1.
    """
    # A finite number, so that a row that sees nothing (past the end of a clip) stays finite.
    visible_BNTS = visible_BTS[..., None, :, :]
    scores_BNTS = jnp.where(visible_BNTS, _scores(query_BTNH, key_BSNH), -1e30)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(value_BSNH.dtype)
    return jnp.einsum("...NTS,...SNH->...TNH", weights_BNTS, value_BSNH)


def _scores(query_BTNH: jax.Array, key_BSNH: jax.Array) -> jax.Array:
    scale = query_BTNH.shape[-1] ** -0.5
    return scale * jnp.einsum(
        "...TNH,...SNH->...NTS", query_BTNH, key_BSNH, preferred_element_type=jnp.float32
    )


def slices(length: int, block: int) -> list[tuple[int, int]]:
    """Where blocks begin and end; the last one may be short."""
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def in_blocks(
    attend: Callable[[jax.Array, jax.Array], jax.Array], query_BTNH: jax.Array, block: int
) -> jax.Array:
    """`attend(queries, number of the first)` of `block` queries at a time, in a loop.

    Scores of all pairs are then never there at once.
    """
    batch, num_frames, *heads = query_BTNH.shape
    block = min(block, num_frames)
    starts_C = jnp.arange(0, num_frames, block)
    tail = len(starts_C) * block - num_frames
    query = jnp.pad(query_BTNH, ((0, 0), (0, tail), (0, 0), (0, 0)))
    query_CBTNH = jnp.moveaxis(query.reshape(batch, -1, block, *heads), 1, 0)
    out_CBTNH = jax.lax.map(lambda inputs: attend(*inputs), (query_CBTNH, starts_C))
    return jnp.moveaxis(out_CBTNH, 0, 1).reshape(batch, -1, *heads)[:, :num_frames]


def self_attention(
    query_BTNH: jax.Array,
    key_BTNH: jax.Array,
    value_BTNH: jax.Array,
    *,
    context: int | None = None,
    length: jax.Array | int | None = None,
) -> jax.Array:
    """Every frame attends to every frame, or to those at most `context` frames away (section 3.2).

    This is the plain statement, with a score for every pair of frames. `kernels.attend` is
    the same up to rounding.

    Args:
      query_BTNH, key_BTNH, value_BTNH: of T frames each.
      context: frames to each side; None is all frames.
      length: frames that exist, a number for all rows or [B] of them; later ones are not attended
        to. What they themselves attend to is arbitrary, but finite.
    """
    query_1T1 = np.arange(query_BTNH.shape[1])[None, :, None]
    key_11S = np.arange(key_BTNH.shape[1])[None, None]
    visible_BTS = near(query_1T1, key_11S, context)
    if length is not None:
        visible_BTS &= existing(key_11S, jnp.reshape(length, (-1, 1, 1)))
    return dense(query_BTNH, key_BTNH, value_BTNH, visible_BTS)


def causal_attention(
    query_BTNH: jax.Array, key_BTNH: jax.Array, value_BTNH: jax.Array, *, block: int = BLOCK
) -> jax.Array:
    """T steps attend to themselves and to those before.

    `block` queries one after another, each with the keys up to its end: about half of the scores
    are left out, and those of all pairs are never there at once.
    """
    parts = []
    for start, end in slices(query_BTNH.shape[1], block):
        visible_1TS = causal(np.arange(start, end)[None, :, None], np.arange(end)[None, None])
        parts.append(
            dense(query_BTNH[:, start:end], key_BTNH[:, :end], value_BTNH[:, :end], visible_1TS)
        )
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
    """The attention of hybrid training, one mask for both halves of a sequence.

    The backward pass makes scores anew, so that those of all pairs are never there at once.
    `first_B`, each row's first step that is predicted in parallel, is at least 1.
    """
    key_11S = jnp.arange(query_BTNH.shape[1])[None, None]

    @jax.checkpoint
    def attend(query_BTNH: jax.Array, start: jax.Array) -> jax.Array:
        query_1T1 = start + jnp.arange(query_BTNH.shape[1])[None, :, None]
        visible_BTS = hybrid(query_1T1, key_11S, first_B[:, None, None], context, delay)
        return dense(query_BTNH, key_BTNH, value_BTNH, visible_BTS)

    return in_blocks(attend, query_BTNH, block)


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
    step_T = np.arange(query_BTNH.shape[1])
    written_11C = existing(jnp.arange(past_BNCH[0].shape[2])[None, None], first)
    causal_1TS = causal(step_T[None, :, None], step_T[None, None])
    return _beside_past(query_BTNH, key_BTNH, value_BTNH, past_BNCH, written_11C, causal_1TS)


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

    All of the cache is seen, and of the T steps the near ones, computed in blocks of queries with
    the keys that they can see. Steps from `length` on do not exist. `delay` may be traced;
    `most_delay` is the greatest that may come.
    """
    num_steps = query_BTNH.shape[1]
    parts = []
    for start, end in slices(num_steps, BLOCK if context is None else HYBRID_BLOCK):
        low, high = 0, num_steps
        if context is not None:
            low, high = max(start - context - most_delay, 0), min(end + context, num_steps)
        query_1T1, key_11S = np.arange(start, end)[None, :, None], np.arange(low, high)[None, None]
        visible_1TS = near(query_1T1, key_11S, context, delay) & existing(key_11S, length)
        keys = key_BTNH[:, low:high], value_BTNH[:, low:high]
        parts.append(_beside_past(query_BTNH[:, start:end], *keys, past_BNCH, None, visible_1TS))
    return jnp.concatenate(parts, axis=1)


def _beside_past(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    past_BNCH: tuple[jax.Array, jax.Array],
    written_11C: jax.Array | None,
    visible_1TS: jax.Array,
) -> jax.Array:
    """One softmax over what is written of a cache (None: all of it), and over other keys."""
    past_key, past_value = past_BNCH
    past_BNTC = query_BTNH.shape[-1] ** -0.5 * jnp.einsum(
        "BTNH,BNCH->BNTC", query_BTNH, past_key, preferred_element_type=jnp.float32
    )
    if written_11C is not None:
        past_BNTC = jnp.where(written_11C[:, None], past_BNTC, -1e30)
    own_BNTS = jnp.where(visible_1TS[:, None], _scores(query_BTNH, key_BSNH), -1e30)
    weights = jax.nn.softmax(jnp.concatenate([past_BNTC, own_BNTS], axis=-1), axis=-1)
    weights = weights.astype(value_BSNH.dtype)
    past_BNTC, own_BNTS = jnp.split(weights, [past_key.shape[2]], axis=-1)
    return jnp.einsum("BNTC,BNCH->BTNH", past_BNTC, past_value) + jnp.einsum(
        "BNTS,BSNH->BTNH", own_BNTS, value_BSNH
    )


def cross_attention(
    query_BTNH: jax.Array,
    key_BSNH: jax.Array,
    value_BSNH: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    zero_11NH: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Every frame attends to the text tokens that `text_mask_BS` marks.

    `num_zero_keys_B` adds that many keys of padding: the reference does not mask the padding of
    shorter texts in a batch. 0 makes a sample independent of its neighbours. `zero_11NH` are key
    and value of padding where biases or norms make them other than zeros. A row without text
    attends to padding alone, as in the reference, and gives exact zeros, or that value.
    """
    mask_B1TS = text_mask_BS[:, None, None, :]
    zeros_B = jnp.maximum(num_zero_keys_B, ~text_mask_BS.any(-1))
    zeros_B111 = zeros_B[:, None, None, None]
    scores_BNTS = _scores(query_BTNH, key_BSNH)
    zero_BNT1 = 0.0 if zero_11NH is None else _scores(query_BTNH, zero_11NH[0])
    peak = jnp.max(jnp.where(mask_B1TS, scores_BNTS, -jnp.inf), axis=-1, keepdims=True)
    peak = jnp.maximum(peak, jnp.where(zeros_B111 > 0, zero_BNT1, -jnp.inf))
    peak = jax.lax.stop_gradient(peak)
    # Scores are replaced before exp, so that neither values nor gradients can overflow.
    exps = jnp.where(mask_B1TS, jnp.exp(jnp.where(mask_B1TS, scores_BNTS - peak, 0.0)), 0.0)
    zero_exps = zeros_B111 * jnp.exp(jnp.where(zeros_B111 > 0, zero_BNT1 - peak, 0.0))
    total = exps.sum(-1, keepdims=True) + zero_exps
    weights_BNTS = (exps / total).astype(value_BSNH.dtype)
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, value_BSNH)
    if zero_11NH is None:
        return out_BTNH
    zero_weights_BTN1 = jnp.swapaxes(zero_exps / total, 1, 2).astype(value_BSNH.dtype)
    return out_BTNH + zero_weights_BTN1 * zero_11NH[1]


def blended_attention(
    query_BTNH: jax.Array,
    key_BGSNH: jax.Array,
    value_BGSNH: jax.Array,
    text_mask_BGS: jax.Array,
    num_zero_keys_BG: jax.Array,
    weight_BTG: jax.Array,
    zero_11NH: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """`cross_attention` to each of G texts, and of what it gives the weighted mean of each frame.

    This is one softmax over the tokens of all texts, with a bias: the logarithm of the text's
    weight, less that of what its tokens add up to. So a text's share is its weight, however many
    tokens it has, and however well they fit the query.
    """
    each = jax.vmap(cross_attention, in_axes=(None, 1, 1, 1, 1, None), out_axes=1)
    each_BGTNH = each(
        query_BTNH, key_BGSNH, value_BGSNH, text_mask_BGS, num_zero_keys_BG, zero_11NH
    )
    weight_BGT11 = jnp.swapaxes(weight_BTG, 1, 2)[..., None, None]
    return (weight_BGT11 * each_BGTNH).sum(1).astype(value_BGSNH.dtype)
