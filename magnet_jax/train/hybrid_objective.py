"""Hybrid-MAGNeT: a clip's beginning one step after another, its rest in parallel (section 5.2,
Appendix E): what such a model learns. docs/hybrid.md says more, hybrid.py makes clips.

Both halves share one sequence of steps in the delay pattern (patterns.py), S of them, of which
step 0 holds nothing. A step t of 1..S is drawn for each clip. Steps before t are the prompt: each
is predicted, in all codebooks, from those before it. The others are MAGNeT's: spans of one codebook
are hidden and predicted, with all codebooks above. The mask is what inference does:

- a step of the prompt attends to itself and to what came before it, at every stage, so that its
  keys and values do not depend on what follows, and a cache of them stays good;
- a step from t on attends to the whole prompt. Of the others it attends to all at stage 0. Above,
  codebook k of frame f stands at step s = 1 + f + delays[k], and the frames `local_context` to both
  sides of f stand from s - delays[k] (the undelayed first codebook) to s (codebook k itself). So it
  attends from s - delays[k] - local_context to s + local_context: the fewest steps that hold all
  those frames of all codebooks that are known.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magnet_jax.config import ModelConfig
from magnet_jax.model import attention, patterns, transformer
from magnet_jax.train import objective
from magnet_jax.train.masking import span_mask


class Noise(NamedTuple):
    """The random numbers of one training step, a row each."""

    masking: objective.Noise
    first_B: jax.Array  # the first step that is not of the prompt, t

    @property
    def rate_B(self) -> jax.Array:
        return self.masking.rate_B


class LossAux(NamedTuple):
    """What the two losses are made of, [B] or totals."""

    parallel: objective.LossAux  # hidden tokens of one codebook, from t on
    autoregressive: objective.LossAux  # tokens of all codebooks, before t
    total: objective.LossAux  # of what is minimised

    @property
    def nll(self) -> jax.Array:
        return self.total.nll

    @property
    def tokens(self) -> jax.Array:
        return self.total.tokens

    def metrics(self) -> dict[str, jax.Array]:
        """Cross-entropy and accuracy of the whole and of each half; NaN where there is no token."""
        found = {}
        for suffix, one in (
            ("", self.total),
            ("_parallel", self.parallel),
            ("_autoregressive", self.autoregressive),
        ):
            tokens = one.tokens.sum()
            found[f"loss{suffix}"] = one.nll.sum() / tokens
            found[f"accuracy{suffix}"] = one.hits.sum() / tokens
        return found


def add_halves(
    parallel: objective.LossAux, autoregressive: objective.LossAux, num_codebooks: int
) -> LossAux:
    """Both halves and their total, a mean over what is predicted.

    A step of the prompt counts as one prediction: its loss is the mean of its codebooks'.
    """
    total = jax.tree.map(lambda one, all_: one + all_ / num_codebooks, parallel, autoregressive)
    return LossAux(parallel, autoregressive, total)


def draw_noise(
    key: jax.Array,
    seed_B: jax.Array,
    config: ModelConfig,
    num_frames: int,
    condition_dropout: float,
) -> Noise:
    """`objective.draw_noise`, and t uniform in 1..S: from no prompt to nothing but prompt."""

    def first(seed: jax.Array) -> jax.Array:
        # The first three keys are those of `objective.draw_noise`.
        own = jax.random.fold_in(jax.random.fold_in(key, seed), 3)
        return jax.random.randint(own, (), 1, patterns.num_steps(num_frames, config.delays) + 1)

    masking = objective.draw_noise(key, seed_B, num_frames, condition_dropout)
    return Noise(masking, jax.vmap(first)(seed_B))


def prompt_frames(first_B: jax.Array, delays: tuple[int, ...], num_frames: int) -> jax.Array:
    """How many frames of each codebook the steps before t hold, int [B, K]."""
    return jnp.clip(first_B[:, None] - 1 - jnp.asarray(delays)[None], 0, num_frames)


@transformer.exact_products
def loss_fn(
    params: dict,
    states_BSE: jax.Array,
    batch: dict[str, jax.Array],
    noise: Noise,
    stage: jax.Array | int,
    *,
    config: ModelConfig,
    local: bool,
    dtype: jnp.dtype = jnp.float32,
    **trunk: Any,
) -> tuple[jax.Array, LossAux]:
    """Both losses from one pass, as `objective.loss_fn` gives its one."""
    codes_BKT, valid_BT = batch["codes_BKT"], batch["valid_BT"]
    num_frames, delays = codes_BKT.shape[-1], jnp.asarray(config.delays)
    prompt_BK = prompt_frames(noise.first_B, config.delays, num_frames)
    prompt_BKT = jnp.arange(num_frames)[None, None] < prompt_BK[..., None]
    masking = noise.masking
    mask_BT = span_mask(masking.starts_BT, masking.rate_B, config.span_length, prompt_BK[:, stage])
    corrupted = objective.corrupt(codes_BKT, mask_BT, valid_BT, stage, config.mask_id, prompt_BKT)
    model = transformer.bind(config, params)
    text_mask_BS = batch["text_mask_BS"] & ~masking.drop_text_B[:, None]
    attend = functools.partial(
        attention.hybrid_attention, first_B=noise.first_B, delay=delays[stage]
    )
    states_BSD = model.trunk(
        patterns.to_steps(corrupted.input_BKT, config.delays, config.mask_id),
        model.project_text(states_BSE, text_mask_BS, dtype=dtype),
        local=local,
        attend=attend,
        **trunk,
    )

    def at_frames(codebook: jax.Array | int, behind: int) -> jax.Array:
        """States [B, T, D] at the steps of a codebook's frames, or so many steps behind them."""
        first = 1 + delays[codebook] - behind
        return jax.lax.dynamic_slice_in_dim(states_BSD, first, num_frames, axis=1)

    logits_BTV = model.head(at_frames(stage, 0), stage)
    parallel = objective.cross_entropy(logits_BTV, corrupted.target_BT, corrupted.mask_BT)

    @jax.checkpoint  # Logits of one codebook at a time, in both directions.
    def add_codebook(
        sofar: objective.LossAux, codebook: jax.Array
    ) -> tuple[objective.LossAux, None]:
        model = transformer.bind(config, params)
        logits_BTV = model.head(at_frames(codebook, 1), codebook)
        counted_BT = prompt_BKT[:, codebook] & valid_BT
        one = objective.cross_entropy(logits_BTV, codes_BKT[:, codebook], counted_BT)
        return jax.tree.map(jnp.add, sofar, one), None

    zeros = jax.tree.map(jnp.zeros_like, parallel)
    autoregressive, _ = jax.lax.scan(add_codebook, zeros, jnp.arange(len(config.delays)))
    aux = add_halves(parallel, autoregressive, len(config.delays))
    return aux.nll.sum(), aux
