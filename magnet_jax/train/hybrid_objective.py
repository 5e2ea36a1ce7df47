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
from typing import NamedTuple

import jax
import jax.numpy as jnp

from magnet_jax.config import ModelConfig, Remat
from magnet_jax.model import attention, patterns, transformer
from magnet_jax.train import objective
from magnet_jax.train.masking import span_mask


class Noise(NamedTuple):
    """The random numbers of one training step, a row each."""

    masking: objective.Noise
    first_B: jax.Array  # the first step that is not of the prompt, t


class Sums(NamedTuple):
    """What a batch adds to the two losses, [B] or totals."""

    parallel: objective.Sums  # hidden tokens of one codebook, from t on
    autoregressive: objective.Sums  # tokens of all codebooks, before t


def draw_noise(
    key: jax.Array,
    seed_B: jax.Array,
    config: ModelConfig,
    num_frames: int,
    condition_dropout: float,
) -> Noise:
    """`objective.draw_noise`, and t uniform in 1..S: from no prompt to nothing but prompt."""

    def first(seed: jax.Array) -> jax.Array:
        # (the first three are `objective.draw_noise`'s)
        own = jax.random.fold_in(jax.random.fold_in(key, seed), 3)
        return jax.random.randint(own, (), 1, patterns.num_steps(num_frames, config.delays) + 1)

    masking = objective.draw_noise(key, seed_B, num_frames, condition_dropout)
    return Noise(masking, jax.vmap(first)(seed_B))


def prompt_frames(first_B: jax.Array, delays: tuple[int, ...], num_frames: int) -> jax.Array:
    """How many frames of each codebook the steps before t hold, int [B, K]."""
    return jnp.clip(first_B[:, None] - 1 - jnp.asarray(delays)[None], 0, num_frames)


def total(sums: Sums, num_codebooks: int) -> objective.Sums:
    """What is minimised, as the sums of one loss.

    It is a mean over what is predicted, for which a step of the prompt counts as one: its loss is
    the mean of its codebooks'.
    """
    return jax.tree.map(lambda one, all_: one + all_ / num_codebooks, *sums)


def means(sums: Sums, num_codebooks: int) -> dict[str, jax.Array]:
    """Cross-entropy and accuracy of the whole and of each half; NaN where there is no token."""
    found = {}
    for suffix, one in (
        ("", total(sums, num_codebooks)),
        ("_parallel", sums.parallel),
        ("_autoregressive", sums.autoregressive),
    ):
        tokens = one.tokens.sum()
        found[f"loss{suffix}"] = one.nll.sum() / tokens
        found[f"accuracy{suffix}"] = one.hits.sum() / tokens
    return found


@transformer.exact_products
def sums(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    codes_BKT: jax.Array,
    valid_BT: jax.Array,
    noise: Noise,
    stage: jax.Array | int,
    *,
    config: ModelConfig,
    local: bool,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    sharding: jax.sharding.Sharding | None = None,
) -> Sums:
    """Each row's share of both losses, from one pass; arguments as of `objective.sums`."""
    num_frames, delays = codes_BKT.shape[-1], jnp.asarray(config.delays)
    prompt_BK = prompt_frames(noise.first_B, config.delays, num_frames)
    prompt_BKT = jnp.arange(num_frames)[None, None] < prompt_BK[..., None]
    masking = noise.masking
    mask_BT = span_mask(masking.starts_BT, masking.rate_B, config.span_length, prompt_BK[:, stage])
    corrupted = objective.hide(codes_BKT, mask_BT, valid_BT, stage, config.mask_id, prompt_BKT)
    model = transformer.bind(config, params)
    text = model.read_text(states_BSE, text_mask_BS & ~masking.drop_text_B[:, None], dtype=dtype)
    states_BSD = model.trunk(
        patterns.to_steps(corrupted.input_BKT, config.delays, config.mask_id),
        text,
        local=local,
        attend=functools.partial(
            attention.hybrid_attention, first_B=noise.first_B, delay=delays[stage]
        ),
        remat=remat,
        sharding=sharding,
    )

    def at_frames(codebook, behind):
        """States [B, T, D] at the steps of a codebook's frames, or so many steps behind them."""
        first = 1 + delays[codebook] - behind
        return jax.lax.dynamic_slice_in_dim(states_BSD, first, num_frames, axis=1)

    logits_BTV = model.head(at_frames(stage, 0), stage)
    parallel = objective.score(logits_BTV, corrupted.target_BT, corrupted.mask_BT)

    @jax.checkpoint  # (logits of one codebook at a time, in both directions)
    def add_codebook(found, codebook):
        model = transformer.bind(config, params)
        logits_BTV = model.head(at_frames(codebook, 1), codebook)
        counted_BT = prompt_BKT[:, codebook] & valid_BT
        one = objective.score(logits_BTV, codes_BKT[:, codebook], counted_BT)
        return jax.tree.map(jnp.add, found, one), None

    zeros = jax.tree.map(jnp.zeros_like, parallel)
    autoregressive, _ = jax.lax.scan(add_codebook, zeros, jnp.arange(len(config.delays)))
    return Sums(parallel, autoregressive)
