"""From texts to tokens and audio with a loaded model, of either kind."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax import autoregressive, decode, t5
from magnet_jax.codec import Codec
from magnet_jax.config import AutoregressiveConfig, CodecSpec, DecodeConfig, ModelConfig, RunConfig
from magnet_jax.errors import UserError
from magnet_jax.pretrained import Loaded


class Generated(NamedTuple):
    codes_BKT: np.ndarray  # int32 token ids
    hidden_PBT: np.ndarray | None  # bool, True where decoding step P predicted; None for musicgen


class Text(NamedTuple):
    """What the network reads of a batch of texts."""

    states_BSE: jax.Array
    mask_BS: np.ndarray
    num_zero_keys_B: np.ndarray


_encode = jax.jit(t5.encode, static_argnames=("config", "dtype"))


def compute_dtype(config: RunConfig) -> jnp.dtype:
    """Precision of the matrix products on this machine."""
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def segment_frames(config: RunConfig, spec: CodecSpec) -> int:
    """Frames of a clip in training."""
    return round(config.data.segment_seconds * spec.frame_rate)


def notes_on_cut_texts(loaded: Loaded, texts: Sequence[str]) -> list[str]:
    """A line for each text that is longer than what the model reads."""
    max_tokens = loaded.config.text.max_tokens
    return [
        f"cut to the {max_tokens} tokens that the model reads: {text[:60]}..."
        for text in texts
        if len(loaded.tokenizer.encode(text).ids) > max_tokens
    ]


def encode_texts(
    loaded: Loaded, texts: Sequence[str], text_pad_len: int | Literal["batch"] | None = None
) -> Text:
    """Runs the text encoder over descriptions, of which an empty one stands for no text.

    `text_pad_len` attends over zeros up to that many positions behind each text, 'batch' up to
    the longest text of the batch, which is what AudioCraft does. By default a text is all that is
    attended over, and no sample depends on its neighbours.
    """
    if isinstance(text_pad_len, str) and text_pad_len != "batch":
        raise UserError(f"text_pad_len must be a number, 'batch' or None, not {text_pad_len!r}")
    max_tokens = loaded.config.text.max_tokens
    tokens = [t5.tokenize(loaded.tokenizer, text, max_tokens) for text in texts]
    ids_BS = np.stack([ids for ids, _ in tokens])
    mask_BS = np.stack([mask for _, mask in tokens])
    states_BSE = _encode(
        loaded.t5_params,
        config=loaded.t5_config,
        text_ids_BS=ids_BS,
        text_mask_BS=mask_BS,
        dtype=compute_dtype(loaded.config),
    )
    lengths_B = mask_BS.sum(-1)
    width = {None: 0, "batch": lengths_B.max(initial=0)}.get(text_pad_len, text_pad_len)
    zeros_B = np.where(lengths_B > 0, np.maximum(width - lengths_B, 0), 0)
    return Text(states_BSE, mask_BS, zeros_B.astype(np.int32))


def generate_codes(
    loaded: Loaded,
    texts: Sequence[str],
    *,
    num_frames: int,
    decoding: DecodeConfig | AutoregressiveConfig,
    seed: int,
    first_sample: int = 0,
    prompt_BKP: np.ndarray | None = None,
    text_pad_len: int | Literal["batch"] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Generated:
    """Generates the tokens of one clip a text.

    Args:
      loaded: the model.
      texts: descriptions; an empty one is generated without text.
      num_frames: frames of a clip, the prompt's included.
      decoding: schedule and sampling, of the model's kind.
      seed, first_sample: clip i depends on (seed, first_sample + i) and its text alone.
      prompt_BKP: given first frames of each clip.
      text_pad_len: see `encode_texts`.
      on_step: called with (steps done, steps in all) while the program runs; one function object,
        one program.

    Raises:
      UserError: the decoding or the prompt does not fit the model.
    """
    model, batch = loaded.config.model, len(texts)
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**31:
        raise UserError(f"seed must lie between 0 and 2147483647, not {seed!r}")
    if isinstance(decoding, AutoregressiveConfig) != (model.kind == "musicgen"):
        raise UserError(f"{type(decoding).__name__} cannot steer a model of kind {model.kind}")
    if prompt_BKP is None:
        prompt_BKP = np.zeros((batch, model.num_codebooks, 0), np.int32)
    if prompt_BKP.shape[-1] >= num_frames:
        raise UserError(
            f"a prompt of {prompt_BKP.shape[-1]} frames leaves nothing to generate of "
            f"{num_frames}: ask for more seconds, or give a shorter prompt"
        )
    generate = _generate_musicgen if model.kind == "musicgen" else _generate_magnet
    return generate(
        loaded,
        encode_texts(loaded, texts, text_pad_len),
        decode.sample_keys(seed, jnp.arange(first_sample, first_sample + batch)),
        jnp.asarray(prompt_BKP, jnp.int32),
        num_frames,
        decoding,
        on_step,
    )


def _generate_magnet(loaded, text, keys_B, prompt_BKP, num_frames, decoding, on_step) -> Generated:
    model = loaded.config.model
    if decoding.span_length:
        model = dataclasses.replace(model, span_length=decoding.span_length)
    if len(decoding.steps) != model.num_codebooks:
        raise UserError(
            f"decode.steps has {len(decoding.steps)} numbers, the model {model.num_codebooks} "
            "codebooks: give one number a codebook"
        )
    num_frames, num_decoded = decoded_frames(model, decoding, num_frames)
    if prompt_BKP.shape[-1] >= num_frames:
        raise UserError(f"the prompt leaves nothing to generate of {num_frames} whole-span frames")
    choice, limit = decode.choice_of(decoding.greedy, decoding.top_k, decoding.top_p)
    decoded = decode.generate(
        loaded.params["lm"],
        *text,
        keys_B,
        prompt_BKP,
        decode.make_schedule(
            decoding,
            num_frames=num_decoded,
            num_prompt=prompt_BKP.shape[-1],
            span_length=model.span_length,
        ),
        limit,
        config=model,
        num_frames=num_decoded,
        choice=choice,
        span_score=decoding.span_score,
        span_arrangement=decoding.span_arrangement,
        dtype=compute_dtype(loaded.config),
        on_step=on_step,
    )
    return Generated(
        np.asarray(decoded.codes_BKT)[..., :num_frames],
        np.asarray(decoded.hidden_PBT)[..., :num_frames],
    )


def decoded_frames(model: ModelConfig, decoding: DecodeConfig, num_frames: int) -> tuple[int, int]:
    """Frames of a clip, and frames to decode for it, of which the rest is cut off.

    Spans on a grid fill whole spans only. The last, partial one is decoded whole and cut, or, with
    `whole_spans`, left out.
    """
    span = model.span_length
    if decoding.span_arrangement == "stride1":
        return num_frames, max(num_frames, span)
    if decoding.whole_spans:
        num_frames = max(num_frames // span, 1) * span
    return num_frames, math.ceil(num_frames / span) * span


def _generate_musicgen(
    loaded, text, keys_B, prompt_BKP, num_frames, decoding, on_step
) -> Generated:
    choice, limit = decode.choice_of(decoding.greedy, decoding.top_k, decoding.top_p)
    codes_BKT = autoregressive.generate(
        loaded.params["lm"],
        *text,
        keys_B,
        prompt_BKP,
        decoding.temperature,
        limit,
        decoding.guidance,
        config=loaded.config.model,
        num_frames=num_frames,
        choice=choice,
        dtype=compute_dtype(loaded.config),
        on_step=on_step,
    )
    return Generated(np.asarray(codes_BKT), None)


def decode_audio(decoder: Codec, codes_BKT: np.ndarray) -> np.ndarray:
    """Audio [B, C, N] (float32) of tokens, a clip's the same whatever is decoded with it."""
    # One at a time: PyTorch's convolutions round differently in batches.
    return np.concatenate([decoder.decode(codes_KT[None]) for codes_KT in codes_BKT])
