"""Hybrid-MAGNeT: a clip's beginning one step after another, its rest in parallel (section 5.2,
Appendix E): what such a model learns, and how a clip is made; docs/hybrid.md says more.

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

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from magnet_jax.config import ModelConfig, Products, Remat
from magnet_jax.decode import autoregressive, parallel
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
    products: Products = "axes",
    written_out: bool = False,
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
        products=products,
        written_out=written_out,
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


# --- decoding -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """How a clip begins, as far as a program is made for it."""

    num_given: int
    """Frames that are given."""
    num_frames: int
    """Frames made one step after another, the given ones included; 0 is none."""
    whole: bool
    """Whether that is the whole clip."""
    choice: parallel.Choice
    guided: bool
    """Whether rows without text are computed as well."""
    apart: bool = False
    """Whether the layers are written out, see `Transformer.layers_apart`."""

    def num_steps(self, delays: tuple[int, ...]) -> int:
        """Steps of the prompt, the empty first one included, until every codebook is that far."""
        return patterns.num_steps(self.num_frames, delays) if self.num_frames else 1

    def of_codebooks(self, delays: tuple[int, ...], most: int) -> tuple[int, ...]:
        """Frames of each codebook in the prompt, of which there are `most` at most."""
        steps = self.num_steps(delays)
        return tuple(min(max(steps - 1 - delay, 0), most) for delay in delays)


@transformer.exact_products
def generate(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    keys_B: jax.Array,
    codes_BKT: jax.Array,
    beginning_sampling: autoregressive.Sampling,
    schedule: tuple[parallel.Schedule, ...],
    limit: jax.Array | float,
    *,
    config: ModelConfig,
    beginning: Beginning,
    choice: parallel.Choice,
    span_score: Literal["max", "prod"],
    span_arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap",
    guided: parallel.GuidedSteps = "all",
    length: jax.Array | int | None = None,
    dtype: jnp.dtype = jnp.float32,
    products: Products = "axes",
    savings: parallel.Savings = parallel.ALL_SAVINGS,
    rescoring: parallel.Rescoring | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> parallel.Decoded:
    """From text encoder states to tokens: a prompt step after step, then the rest; to be traced.

    The prompt's keys and values are computed once: the rest attends to the cache.

    Args:
      codes_BKT: the given first frames, then anything.
      beginning, beginning_sampling: of the steps one after another.
      products: see `transformer.product`.
      schedule: from `parallel.make_schedule`, with the prompt that `Beginning.of_codebooks` tells.
      params, states_BSE, text_mask_BS, num_zero_keys_B, keys_B, limit, config, choice, span_score,
        span_arrangement, guided, length, dtype, savings, rescoring, on_step: see
        `parallel.generate`.
    """
    batch, _, num_frames = codes_BKT.shape
    delays, mask_id = config.delays, config.mask_id
    length = num_frames if length is None else length
    prompt_steps = beginning.num_steps(delays)
    prompt_K = beginning.of_codebooks(delays, num_frames)
    model = transformer.bind(config, params)
    text = model.read_text(states_BSE, text_mask_BS, num_zero_keys_B, dtype=dtype)
    # Both halves read one cache, and either may want the rows without text.
    with_null = beginning.guided or (guided != "none" and not beginning.whole)
    null_text = config.null_text_adds_nothing
    rows_text = transformer.with_null_rows(text) if with_null and not null_text else text

    num_first = prompt_steps - 1 - beginning.num_given if beginning.num_frames else 0
    num_later = 0 if beginning.whole else sum(part.stage.size for part in schedule)
    num_steps = num_first + num_later

    def report(done: jax.Array) -> None:
        jax.debug.callback(on_step, done, num_steps)

    frame_T = jnp.arange(num_frames)
    known_BKT = jnp.where(frame_T < length, autoregressive.UNKNOWN, mask_id)[None, None]
    known_BKT = jnp.where((frame_T < beginning.num_given)[None, None], codes_BKT, known_BKT)
    steps_BKS = patterns.to_steps(known_BKT, delays, mask_id, prompt_steps)
    steps_BKS, cache = autoregressive.advance(
        config, params, rows_text, keys_B, steps_BKS, beginning_sampling,
        num_given=1 + beginning.num_given if beginning.num_frames else 1,
        choice=beginning.choice, guided=with_null, apart=beginning.apart,
        spare=0 if beginning.whole else 1, products=products, on_step=on_step and report,
    )  # fmt: skip
    made_BKT, _ = patterns.to_frames(steps_BKS, delays, num_frames, first=1)
    prompt_1KT = (frame_T[None] < jnp.asarray(prompt_K)[:, None])[None]
    codes_BKT = jnp.where(prompt_1KT, made_BKT, mask_id)
    if beginning.whole:
        return parallel.Decoded(codes_BKT, jnp.zeros((0, batch, num_frames), bool))

    # The last step of the prompt predicts nothing; the rest attends to it.
    last_BK1 = steps_BKS[..., -1:]
    rows = jnp.concatenate([last_BK1] * (1 + with_null))
    _, cache = model.extend(rows, rows_text, cache, prompt_steps - 1, products=products)

    def later(done: jax.Array, _: int) -> None:
        on_step(done + num_first, num_steps)

    return parallel.decode(
        _completing_network(
            config, params, text, cache, prompt_steps, num_frames, length, products
        ),
        schedule,
        # (0 is no step of the prompt's, whose own keys are made with their numbers)
        jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, 0),
        codes_BKT,
        prompt_K,
        limit,
        mask_id=mask_id,
        span_length=config.span_length,
        choice=choice,
        span_score=span_score,
        span_arrangement=span_arrangement,
        guided=guided,
        length=length,
        savings=savings,
        predicts_given=False,
        rescoring=rescoring,
        on_step=on_step and later,
    )


def _completing_network(
    config: ModelConfig,
    params: dict,
    text: transformer.TextKeys,
    cache: transformer.Cache,
    prompt_steps: int,
    num_frames: int,
    length: jax.Array | int,
    products: Products = "axes",
) -> parallel.Network:
    """The steps after a prompt as `decode` sees them, by frames of the codebook to predict."""
    delays = jnp.asarray(config.delays)
    num_steps = patterns.num_steps(num_frames, config.delays)
    positions_1SD = jnp.asarray(transformer.sinusoids(num_steps, config.width))[None]
    null_rows = transformer.with_null_rows(text)

    def trunk(codes_BKT, *, stage, local, guided, first_B):
        rows, rows_text = codes_BKT, text
        if guided:
            rows = jnp.concatenate([codes_BKT, codes_BKT])
            rows_text = text if config.null_text_adds_nothing else null_rows
        steps_RKS = patterns.to_steps(rows, config.delays, config.mask_id)
        states_RSD = transformer.bind(config, params).trunk(
            steps_RKS[..., prompt_steps:],
            rows_text,
            local=local,
            attend=functools.partial(
                attention.completing_attention,
                delay=delays[stage],
                most_delay=max(config.delays),
                length=patterns.num_steps(length, config.delays) - prompt_steps,
            ),
            positions_BTD=positions_1SD[:, prompt_steps:],
            past=jax.tree.map(lambda x: x[:, : len(rows)], cache),
            products=products,
        )
        # (the prompt is not predicted, and its frames' states may be anything)
        states_RSD = jnp.pad(states_RSD, ((0, 0), (prompt_steps, 0), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(states_RSD, 1 + delays[stage], num_frames, axis=1)

    def head(states_RMD, stage, *, guided):
        logits_RMV = transformer.bind(config, params).head(states_RMD, stage)
        return tuple(jnp.split(logits_RMV, 2)) if guided else (logits_RMV, None)

    return parallel.Network(trunk, head)
