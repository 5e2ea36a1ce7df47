"""Texts as programs take them: tokens, in few shapes."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax import arguments, prompts
from magnet_jax.arguments import Between
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.errors import UserError
from magnet_jax.model import t5
from magnet_jax.model.transformer import TextKeys, Transformer
from magnet_jax.prompts import Description

TextPadLen = Literal["batch"] | Annotated[int, Between(0, 2**16)] | None
SHORTEST_TEXT = 16  # tokens of the smallest text bucket; the others double
_NEVER = 2.0**30  # a frame that no clip has


class Shares(NamedTuple):
    """How much each of a clip's G texts counts, frame by frame, see `prompts.shares`."""

    knot_BP: np.ndarray | jax.Array  # frames, float32, ascending
    weight_BPG: np.ndarray | jax.Array


class Text(NamedTuple):
    """The tokens of a batch of texts, as the text encoder and the network take them.

    With `shares` clips have G texts each, and ids and mask are [B, G, S], zero keys [B, G].
    """

    ids_BS: np.ndarray
    mask_BS: np.ndarray
    num_zero_keys_B: np.ndarray
    shares: Shares | None = None
    negative: Optional["Text"] = None
    """What guidance leads away from, in the same shapes; None is no text, for all clips."""

    @property
    def any(self) -> bool:
        """Whether guidance has anything to go by."""
        return self.negative is not None or bool(self.mask_BS.any())


def notes_on_cut_texts(loaded: Loaded, texts: Sequence[Description]) -> list[str]:
    """A line for each text that is longer than what the model reads."""
    max_tokens = loaded.config.text.max_tokens
    return [
        f"cut to the {max_tokens} tokens that the model reads: {text[:60]}..."
        for description in texts
        for text in prompts.all_texts(description)
        if len(loaded.tokenizer.encode(text).ids) > max_tokens
    ]


class TextStates(NamedTuple):
    """What the text encoder makes of a batch of texts; with `shares`, of G texts a clip."""

    states_BSE: jax.Array
    mask_BS: jax.Array  # True at tokens; a row without any has no text
    num_zero_keys_B: jax.Array  # see `attention.cross_attention`; zeros make samples independent
    shares: Shares | None = None
    negative: Optional["TextStates"] = None


def tokenize_texts(
    loaded: Loaded, texts: Sequence[Description], text_pad_len: TextPadLen = None
) -> Text:
    """The tokens of descriptions, of which an empty one stands for no text.

    `text_pad_len` attends over zeros that fill each text up to that many positions, 'batch' up to
    the longest text of the batch, which is what AudioCraft does. By default a text is all that is
    attended over, and no sample depends on its neighbours.

    The width S is the least of 16, 32, 64, ... that holds the longest text: few shapes, and short
    texts are cheap. So is the number of texts a clip, of 1, 2, 4, ...
    """
    text_pad_len = arguments.check(TextPadLen, text_pad_len, "text_pad_len")
    if not texts:
        raise UserError("no clips are asked for: give at least one text, '' for none")
    found = [prompts.simplified(text) for text in texts]
    if all(isinstance(text, str) for text in found):
        return _tokens(loaded, found, text_pad_len)
    found = [prompts.Prompt(text) if isinstance(text, str) else text for text in found]
    rows = [(prompt, prompt.sections) for prompt in found]
    negatives = [(prompt, prompt.negatives) for prompt in found]
    negative = any(any(prompts.texts_in(sections)) for _, sections in negatives)
    rows = [*rows, *negatives] if negative else rows
    text = _blended(loaded, rows, text_pad_len)
    if not negative:
        return text
    halves = [jax.tree.map(lambda x, h=h: np.split(x, 2)[h], text) for h in (0, 1)]
    return halves[0]._replace(negative=halves[1])


def _tokens(loaded: Loaded, texts: Sequence[str], text_pad_len: TextPadLen) -> Text:
    """A row of tokens for each text."""
    max_tokens = loaded.config.text.max_tokens
    tokens = [t5.tokenize(loaded.tokenizer, text, max_tokens) for text in texts]
    ids_BS = np.stack([ids for ids, _ in tokens])
    mask_BS = np.stack([mask for _, mask in tokens])
    lengths_B = mask_BS.sum(-1)
    longest = int(lengths_B.max(initial=0))
    bucket = min(max_tokens, max(SHORTEST_TEXT, 2 ** math.ceil(math.log2(max(longest, 1)))))
    width = {None: 0, "batch": longest}.get(text_pad_len, text_pad_len)
    zeros_B = np.where(lengths_B > 0, np.maximum(width - lengths_B, 0), 0)
    return Text(ids_BS[:, :bucket], mask_BS[:, :bucket], zeros_B.astype(np.int32))


def _blended(
    loaded: Loaded,
    rows: Sequence[tuple[prompts.Prompt, Sequence[prompts.Section]]],
    text_pad_len: TextPadLen,
) -> Text:
    """Several texts for each row, and their shares; one for each where none has more."""
    texts = [prompts.texts_in(sections) for _, sections in rows]
    groups = 2 ** math.ceil(math.log2(max(map(len, texts))))
    filled = [text for own in texts for text in [*own, *[""] * (groups - len(own))]]
    text = _tokens(loaded, filled, text_pad_len)
    if groups == 1:
        return text
    text = Text(*(x.reshape(len(rows), groups, *x.shape[1:]) for x in text[:3]))
    shares = [
        prompts.shares(
            sections, own, fade=prompt.fade, start=prompt.start,
            frame_rate=loaded.codec.frame_rate,
        )
        for (prompt, sections), own in zip(rows, texts)
    ]  # fmt: skip
    longest = max(len(knot_P) for knot_P, _ in shares)
    knots = max(2, 2 ** math.ceil(math.log2(longest)))  # to interpolate takes two
    knot_BP = np.full((len(rows), knots), _NEVER, np.float32)
    weight_BPG = np.zeros((len(rows), knots, groups), np.float32)
    for row, (knot_P, weight_PG) in enumerate(shares):
        knot_BP[row, : len(knot_P)] = knot_P
        weight_BPG[row, :, : weight_PG.shape[1]] = weight_PG[-1]
        weight_BPG[row, : len(knot_P), : weight_PG.shape[1]] = weight_PG
    return text._replace(shares=Shares(knot_BP, weight_BPG))


# --- in the program ------------------------------------------------------------------------------


def encode(params: dict, config: t5.T5Config, text: Text, *, dtype: jnp.dtype) -> TextStates:
    """What the text encoder makes of texts, each by itself. To be traced."""
    rows = (x.reshape(-1, x.shape[-1]) for x in (text.ids_BS, text.mask_BS))
    states = t5.encode(params, config, *rows, dtype=dtype)
    states = states.reshape(*text.ids_BS.shape, states.shape[-1])
    negative = text.negative and encode(params, config, text.negative, dtype=dtype)
    return TextStates(states, text.mask_BS, text.num_zero_keys_B, text.shares, negative)


def read(model: Transformer, text: TextStates, num_frames: int, *, dtype: jnp.dtype) -> TextKeys:
    """What cross-attention needs of texts. To be traced.

    `num_frames` are those of a clip, or the steps of a model that predicts the next one, of which
    number t predicts frame t of the first codebook.
    """
    negative = text.negative and read(model, text.negative, num_frames, dtype=dtype)
    if text.shares is None:
        return model.read_text(*text[:3], dtype=dtype)._replace(negative=negative)
    batch, groups = text.mask_BS.shape[:2]
    rows = (x.reshape(batch * groups, *x.shape[2:]) for x in text[:3])
    keys = model.read_text(*rows, dtype=dtype)
    key, value = (x.reshape(len(x), batch, groups, *x.shape[2:]) for x in keys[:2])
    at = jax.vmap(jnp.interp, (None, None, 1), 1)  # of all texts,
    at = jax.vmap(at, (None, 0, 0))  # and of all clips
    weight_BTG = at(jnp.arange(num_frames, dtype=jnp.float32), *text.shares)
    return TextKeys(key, value, text.mask_BS, text.num_zero_keys_B, weight_BTG, negative)
