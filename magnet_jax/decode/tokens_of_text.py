"""Texts as programs take them: tokens, in few shapes."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np

from magnet_jax import arguments
from magnet_jax.arguments import Between
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.errors import UserError
from magnet_jax.model import precision, t5

TextPadLen = Literal["batch"] | Annotated[int, Between(0, 2**16)] | None
SHORTEST_TEXT = 16  # tokens of the smallest text bucket; the others double


class Text(NamedTuple):
    """The tokens of a batch of texts, as the text encoder and the network take them."""

    ids_BS: np.ndarray
    mask_BS: np.ndarray
    num_zero_keys_B: np.ndarray


def notes_on_cut_texts(loaded: Loaded, texts: Sequence[str]) -> list[str]:
    """A line for each text that is longer than what the model reads."""
    max_tokens = loaded.config.text.max_tokens
    return [
        f"cut to the {max_tokens} tokens that the model reads: {text[:60]}..."
        for text in texts
        if len(loaded.tokenizer.encode(text).ids) > max_tokens
    ]


class TextStates(NamedTuple):
    """What the text encoder makes of a batch of texts."""

    states_BSE: jax.Array
    mask_BS: jax.Array  # True at tokens; a row without any has no text
    num_zero_keys_B: jax.Array  # see `attention.cross_attention`; zeros make samples independent


def tokenize_texts(loaded: Loaded, texts: Sequence[str], text_pad_len: TextPadLen = None) -> Text:
    """The tokens of descriptions, of which an empty one stands for no text.

    `text_pad_len` attends over zeros up to that many positions behind each text, 'batch' up to
    the longest text of the batch, which is what AudioCraft does. By default a text is all that is
    attended over, and no sample depends on its neighbours.

    The width S is the least of 16, 32, 64, ... that holds the longest text: few shapes, and short
    texts are cheap.
    """
    text_pad_len = arguments.check(TextPadLen, text_pad_len, "text_pad_len")
    if not texts:
        raise UserError("no clips are asked for: give at least one text, '' for none")
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


_encode = jax.jit(t5.encode, static_argnames=("config", "dtype"))


def encode_texts(loaded: Loaded, text: Text) -> jax.Array:
    """The text encoder's states, float32 [B, S, E]."""
    return _encode(
        loaded.t5_params,
        config=loaded.t5_config,
        text_ids_BS=text.ids_BS,
        text_mask_BS=text.mask_BS,
        dtype=precision.compute_dtype(loaded.config),
    )
