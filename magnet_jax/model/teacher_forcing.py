"""The logits of given tokens, each predicted from the steps before it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.config import ModelConfig
from magnet_jax.model import attention, patterns, transformer


def attend_causally(*qkv: jax.Array, context: None) -> jax.Array:
    """What `Transformer.trunk` wants of a model that sees the past alone."""
    return attention.causal_attention(*qkv)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
@transformer.exact_products
def step_logits(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    steps_BKS: jax.Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """What the model predicts after each of S steps: logits float32 [B, K, S, V].

    Args:
      params: the transformer's parameters.
      states_BSE, text_mask_BS, num_zero_keys_B: see `Transformer.read_text`.
      steps_BKS: from `patterns.to_steps`.
    """
    model = transformer.bind(config, params)
    text = model.read_text(states_BSE, text_mask_BS, num_zero_keys_B, dtype=dtype)
    states_BSD = model.trunk(steps_BKS, text, local=False, attend=attend_causally)
    return model.all_heads(states_BSD)


def teacher_forced(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    codes_BKT: jax.Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, np.ndarray]:
    """What the model predicts for each code from the steps before it, in one pass.

    Args:
      params, states_BSE, text_mask_BS, num_zero_keys_B: see `step_logits`.
      codes_BKT: token ids 0..V; V where a code is not known.

    Returns:
      logits float32 [B, K, T, V], aligned with the codes, and valid [K, T]: False at the last
      frames of delayed codebooks, which would need steps past the end (their logits are another
      frame's).
    """
    num_frames = codes_BKT.shape[-1]
    steps_BKS = patterns.to_steps(codes_BKT, config.delays, config.mask_id, num_frames)
    logits_BKSV = step_logits(
        params, states_BSE, text_mask_BS, num_zero_keys_B, steps_BKS, config=config, dtype=dtype
    )
    return patterns.to_frames(logits_BKSV, config.delays, num_frames, first=0)
