"""From texts to tokens with a loaded model: what sampling and training's samples share."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax import decode, t5
from magnet_jax.checkpoint import Loaded
from magnet_jax.config import CodecSpec, DecodeConfig, RunConfig
from magnet_jax.errors import UserError


class Generated(NamedTuple):
    codes_BKT: np.ndarray  # int32 token ids
    hidden_PBT: np.ndarray  # bool, True where decoding step P predicted


_encode = jax.jit(t5.encode, static_argnames=("config", "dtype"))


def compute_dtype(config: RunConfig) -> jnp.dtype:
    """Precision of the matrix products on this machine."""
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def segment_frames(config: RunConfig, spec: CodecSpec) -> int:
    """Frames of a clip in training."""
    return round(config.data.segment_seconds * spec.frame_rate)


def generate_codes(
    loaded: Loaded,
    texts: Sequence[str],
    *,
    num_frames: int,
    decoding: DecodeConfig,
    seed: int,
    first_sample: int = 0,
) -> Generated:
    """Generates the tokens of one clip a text.

    Args:
      loaded: the model.
      texts: descriptions; an empty one is generated without text.
      num_frames: frames of a clip.
      decoding: schedule and sampling.
      seed, first_sample: clip i depends on (seed, first_sample + i) and its text alone.

    Raises:
      UserError: the decoding does not fit the model.
    """
    config = loaded.config.model
    if len(decoding.steps) != config.num_codebooks:
        raise UserError(
            f"decode.steps has {len(decoding.steps)} numbers, the model {config.num_codebooks} "
            "codebooks: give one number a codebook"
        )
    max_tokens = loaded.config.text.max_tokens
    tokens = [t5.tokenize(loaded.tokenizer, text, max_tokens) for text in texts]
    text_ids_BS = np.stack([ids for ids, _ in tokens])
    text_mask_BS = np.stack([mask for _, mask in tokens])
    # Whole spans are decoded; what exceeds the wanted length is cut off.
    num_spans = math.ceil(num_frames / config.span_length)
    batch = len(texts)
    dtype = compute_dtype(loaded.config)
    states_BSE = _encode(
        loaded.t5_params,
        config=loaded.t5_config,
        text_ids_BS=text_ids_BS,
        text_mask_BS=text_mask_BS,
        dtype=dtype,
    )
    decoded = decode.generate(
        loaded.params["lm"],
        states_BSE,
        text_mask_BS,
        jnp.zeros(batch, jnp.int32),
        decode.sample_keys(seed, jnp.arange(first_sample, first_sample + batch)),
        jnp.zeros((batch, config.num_codebooks, 0), jnp.int32),
        decode.make_schedule(decoding, num_spans),
        decoding.top_p,
        config=config,
        num_frames=num_spans * config.span_length,
        greedy=decoding.greedy,
        span_score=decoding.span_score,
        dtype=dtype,
    )
    return Generated(
        np.asarray(decoded.codes_BKT)[..., :num_frames],
        np.asarray(decoded.hidden_PBT)[..., :num_frames],
    )
