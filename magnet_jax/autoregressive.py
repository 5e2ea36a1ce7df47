"""MusicGen: text to tokens one step at a time, and the logits of given tokens (teacher forcing).

The network is MAGNeT's under causal attention, its codebooks in the delay pattern (patterns.py;
Copet et al. 2023, arXiv 2306.05284). Every step reads and predicts all codebooks at once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax import patterns, transformer
from magnet_jax.config import ModelConfig
from magnet_jax.decode import Choice, choose_token

UNKNOWN = -1  # stands where a code is still to be generated


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
    batch, _, num_steps = steps_BKS.shape
    states_BSD, _ = model.extend(steps_BKS, text, model.empty_cache(batch, num_steps, dtype), 0)
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


@functools.partial(jax.jit, static_argnames=("config", "num_frames", "choice", "dtype", "on_step"))
@transformer.exact_products
def generate(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    keys_B: jax.Array,
    prompt_BKP: jax.Array,
    temperature: jax.Array | float,
    limit: jax.Array | float,
    guidance: jax.Array | float,
    *,
    config: ModelConfig,
    num_frames: int,
    choice: Choice,
    dtype: jnp.dtype = jnp.float32,
    on_step: Callable[[int, int], None] | None = None,
) -> jax.Array:
    """From text encoder states to tokens, one program a shape.

    Args:
      params: the transformer's parameters.
      states_BSE, text_mask_BS, num_zero_keys_B: see `Transformer.read_text`; a row without text is
        generated unconditionally.
      keys_B: from `decode.sample_keys`.
      prompt_BKP: given first frames, P may be 0.
      temperature, limit: see `decode.choose_token`; traced, as is `guidance`, the coefficient.
      num_frames: T, the prompt's included.
      choice: how tokens are chosen.
      on_step: called with (steps done, steps in all) while the program runs.

    Returns:
      token ids [B, K, T].
    """
    batch, num_codebooks, num_prompt = prompt_BKP.shape
    if num_prompt >= num_frames:
        raise ValueError(f"a prompt of {num_prompt} frames leaves nothing of {num_frames}")
    model = transformer.bind(config, params)
    text = model.read_text(states_BSE, text_mask_BS, num_zero_keys_B, dtype=dtype)
    if not config.null_text_adds_nothing:
        text = transformer.with_null_rows(text)
    unknown_BKT = jnp.full((batch, num_codebooks, num_frames - num_prompt), UNKNOWN, jnp.int32)
    steps_BKS = patterns.to_steps(
        jnp.concatenate([prompt_BKP, unknown_BKT], axis=-1), config.delays, config.mask_id
    )
    num_steps = steps_BKS.shape[-1]

    def twice(codes_BKC):  # rows with their text, and the same rows without
        return jnp.concatenate([codes_BKC, codes_BKC])

    cache = model.empty_cache(2 * batch, num_steps - 1, dtype)
    if num_prompt:
        _, cache = model.extend(twice(steps_BKS[..., :num_prompt]), text, cache, 0)

    def advance(carry, step):
        """Predicts step `step` from the one before it, which is complete by then."""
        steps_BKS, cache = carry
        before_BK1 = jax.lax.dynamic_slice_in_dim(steps_BKS, step - 1, 1, axis=-1)
        model = transformer.bind(config, params)
        states_B1D, cache = model.extend(twice(before_BK1), text, cache, step - 1)
        with_BKV, without_BKV = jnp.split(model.all_heads(states_B1D)[:, :, 0], 2)
        logits_BKV = without_BKV + guidance * (with_BKV - without_BKV)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, step)
        probs_BKV = jax.nn.softmax(logits_BKV / temperature, axis=-1)
        token_BK = choose_token(keys, probs_BKV, choice, limit)
        given_BK = jax.lax.dynamic_index_in_dim(steps_BKS, step, axis=-1, keepdims=False)
        token_BK = jnp.where(given_BK == UNKNOWN, token_BK, given_BK)
        steps_BKS = jax.lax.dynamic_update_index_in_dim(steps_BKS, token_BK, step, axis=-1)
        if on_step is not None:
            jax.debug.callback(on_step, step - num_prompt, num_steps - 1 - num_prompt)
        return (steps_BKS, cache), None

    (steps_BKS, _), _ = jax.lax.scan(
        advance, (steps_BKS, cache), jnp.arange(num_prompt + 1, num_steps)
    )
    codes_BKT, _ = patterns.to_frames(steps_BKS, config.delays, num_frames, first=1)
    return codes_BKT
