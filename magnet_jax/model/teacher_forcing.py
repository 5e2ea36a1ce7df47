"""The logits of given tokens, each predicted from the steps before it."""

import functools

import jax
import jax.numpy as jnp

from magnet_jax.config import ModelConfig
from magnet_jax.model import attention, transformer


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
