"""Decoding of a hybrid: a clip's beginning one step after another, its rest in parallel.

Section 5.2 and Appendix E of the paper; hybrid_objective.py says what such a model learns, and with
which mask. The rest attends to a cache of the beginning's keys and values.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from magnet_jax.config import ModelConfig
from magnet_jax.decode import autoregressive, parallel
from magnet_jax.model import attention, patterns, transformer


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
    savings: parallel.Savings = parallel.ALL_SAVINGS,
    rescoring: parallel.Rescoring | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> parallel.Decoded:
    """From text encoder states to tokens: a prompt step after step, then the rest; to be traced.

    The prompt's keys and values are computed once: the rest attends to the cache.

    Args:
      codes_BKT: the given first frames, then anything.
      beginning, beginning_sampling: of the steps one after another.
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
        spare=0 if beginning.whole else 1, on_step=on_step and report,
    )  # fmt: skip
    made_BKT, _ = patterns.to_frames(steps_BKS, delays, num_frames, first=1)
    prompt_1KT = (frame_T[None] < jnp.asarray(prompt_K)[:, None])[None]
    codes_BKT = jnp.where(prompt_1KT, made_BKT, mask_id)
    if beginning.whole:
        return parallel.Decoded(codes_BKT, jnp.zeros((0, batch, num_frames), bool))

    # The last step of the prompt predicts nothing; the rest attends to it.
    last_BK1 = steps_BKS[..., -1:]
    rows = jnp.concatenate([last_BK1] * (1 + with_null))
    _, cache = model.extend(rows, rows_text, cache, prompt_steps - 1)

    def later(done: jax.Array, _: int) -> None:
        on_step(done + num_first, num_steps)

    return parallel.decode(
        _completing_network(config, params, text, cache, prompt_steps, num_frames, length),
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
        )
        # (the prompt is not predicted, and its frames' states may be anything)
        states_RSD = jnp.pad(states_RSD, ((0, 0), (prompt_steps, 0), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(states_RSD, 1 + delays[stage], num_frames, axis=1)

    def head(states_RMD, stage, *, guided):
        logits_RMV = transformer.bind(config, params).head(states_RMD, stage)
        return tuple(jnp.split(logits_RMV, 2)) if guided else (logits_RMV, None)

    return parallel.Network(trunk, head)
