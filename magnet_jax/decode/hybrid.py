"""Decoding of a hybrid: a clip's beginning one step after another, its rest in parallel.

Section 5.2 and Appendix E of the paper; hybrid_objective.py says what such a model learns, and with
which mask. The beginning is given to the rest, which attends to a cache of its keys and values.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from magnet_jax.config import ModelConfig
from magnet_jax.decode import autoregressive, parallel, tokens_of_text
from magnet_jax.decode.autoregressive import UNKNOWN, Beginning
from magnet_jax.decode.canvas import Canvas
from magnet_jax.decode.magnet import ALL_SAVINGS, Savings
from magnet_jax.decode.ring import Ring
from magnet_jax.decode.schedule import Schedule
from magnet_jax.decode.tokens_of_text import TextStates
from magnet_jax.model import attention, patterns, transformer


@transformer.exact_products
def generate(
    params: dict,
    text_states: TextStates,
    task: parallel.Task,
    schedule: tuple[Schedule, ...],
    sampling: autoregressive.Sampling,
    *,
    config: ModelConfig,
    rules: parallel.Rules,
    beginning: Beginning,
    savings: Savings = ALL_SAVINGS,
    dtype: jnp.dtype = jnp.float32,
) -> parallel.Decoded:
    """From text encoder states to tokens: a beginning step after step, then the rest; to be traced.

    Args:
      params, text_states, schedule, config, rules, savings, dtype: see `magnet.generate`.
      task: of whose canvas the first `beginning.num_given` frames are given.
      sampling, beginning: of the steps one after another.
    """
    num_steps = patterns.num_steps(task.canvas.codes_BKT.shape[-1], config.delays)
    model = transformer.bind(config, params)
    text = tokens_of_text.read(model, text_states, num_steps, dtype=dtype)
    both = text  # rows with text and, where these count, rows without
    if text.negative is not None or not (savings.null_text and config.null_text_adds_nothing):
        both = transformer.with_null_rows(text)
    # Both halves read one cache, and either may want the rows without text.
    guided = beginning.guided or (rules.guided != "none" and not beginning.whole)
    num_first = beginning.num_steps(config.delays) - beginning.num_known_steps
    num_later = 0 if beginning.whole else sum(part.stage.size for part in schedule)
    total = num_first + num_later
    made, cache = _begin(
        params, both if guided else text, task, sampling, config=config, beginning=beginning,
        guided=guided, on_step=_counted(rules.on_step, 0, total),
    )  # fmt: skip
    if beginning.whole:
        batch, _, num_frames = made.codes_BKT.shape
        codes_BKT = jnp.where(made.given_BKT, made.codes_BKT, rules.mask_id)
        return parallel.Decoded(codes_BKT, jnp.zeros((0, batch, num_frames), bool))
    rules = dataclasses.replace(
        rules, given_have_say=False, on_step=_counted(rules.on_step, num_first, total)
    )
    network = _network_after(config, params, text, both, cache, beginning, task, rules.ring)
    # 0 is no step of the beginning's, whose own keys are made with their numbers.
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(task.keys_B, 0)
    return parallel.decode(network, rules, task._replace(canvas=made, keys_B=keys_B), schedule)


def _counted(on_step: Callable | None, before: int, total: int) -> Callable | None:
    """`on_step` of steps that come after others; given the number of a step alone, too."""
    return on_step and (lambda done, *_: on_step(done + before, total))


def _begin(
    params: dict,
    text: transformer.TextKeys,
    task: parallel.Task,
    sampling: autoregressive.Sampling,
    *,
    config: ModelConfig,
    beginning: Beginning,
    guided: bool,
    on_step: Callable | None,
) -> tuple[Canvas, transformer.Cache]:
    """The canvas of which the beginning is made and given, and the cache of all its steps."""
    num_frames = task.canvas.codes_BKT.shape[-1]
    delays, frame_T = config.delays, jnp.arange(num_frames)
    known_BKT = jnp.where(task.exists_T, UNKNOWN, config.mask_id)[None, None]
    given_T = frame_T < beginning.num_given
    known_BKT = jnp.where(given_T[None, None], task.canvas.codes_BKT, known_BKT)
    num_steps = beginning.num_steps(delays)
    steps_BKS, cache = autoregressive.advance(
        config, params, text, task.keys_B,
        patterns.to_steps(known_BKT, delays, config.mask_id, num_steps), sampling,
        beginning=beginning, guided=guided, origin_B=task.origin_B,
        on_step=on_step and functools.partial(jax.debug.callback, on_step),
    )  # fmt: skip
    codes_BKT, _ = patterns.to_frames(steps_BKS, delays, num_frames, first=1)
    frames_K = jnp.asarray(beginning.of_codebooks(delays, num_frames))
    given_1KT = (frame_T[None] < frames_K[:, None])[None]
    if not beginning.whole:
        # The last step of the beginning predicts nothing; the rest attends to it.
        last_BK1 = steps_BKS[..., -1:]
        rows = jnp.concatenate([last_BK1] * (1 + guided))
        _, cache = transformer.bind(config, params).extend(rows, text, cache, num_steps - 1)
    codes_BKT = jnp.where(task.canvas.given_BKT, task.canvas.codes_BKT, codes_BKT)
    return Canvas(codes_BKT, given_1KT | task.canvas.given_BKT), cache


def _network_after(
    config: ModelConfig,
    params: dict,
    text: transformer.TextKeys,
    both: transformer.TextKeys,
    cache: transformer.Cache,
    beginning: Beginning,
    task: parallel.Task,
    ring: Ring | None = None,
) -> parallel.Network:
    """The steps after a beginning as `decode` sees them, by frames of the codebook to predict."""
    delays, first = jnp.asarray(config.delays), beginning.num_steps(config.delays)
    num_frames = task.canvas.codes_BKT.shape[-1] if ring is None else ring.window
    length = num_frames if task.length is None or ring is not None else task.length
    num_steps = patterns.num_steps(num_frames, config.delays)
    positions_1SD = jnp.asarray(transformer.sinusoids(num_steps, config.width))[None]

    def trunk(codes_BKT, *, stage, local, guided, first_B, frame_1T=None):
        rows = jnp.concatenate([codes_BKT] * (1 + guided))
        steps_RKS = patterns.to_steps(rows, config.delays, config.mask_id)
        frame_1S = jnp.arange(first, num_steps)[None] - 1 - delays[stage]
        if frame_1T is not None:  # the line of a ring's frames
            frame_1S = jnp.take(frame_1T, frame_1S[0], axis=1, mode="clip")
        states_RSD = transformer.bind(config, params).trunk(
            steps_RKS[..., first:],
            (both if guided else text).at(frame_1S),
            local=local,
            attend=functools.partial(
                attention.completing_attention,
                delay=delays[stage],
                most_delay=max(config.delays),
                length=patterns.num_steps(length, config.delays) - first,
            ),
            positions_BTD=positions_1SD[:, first:],
            past=jax.tree.map(lambda x: x[:, : len(rows)], cache),
        )
        # The beginning is not predicted, and its frames' states may be anything.
        states_RSD = jnp.pad(states_RSD, ((0, 0), (first, 0), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(states_RSD, 1 + delays[stage], num_frames, axis=1)

    def head(states_RMD, stage, *, guided):
        logits_RMV = transformer.bind(config, params).head(states_RMD, stage)
        return tuple(jnp.split(logits_RMV, 2)) if guided else (logits_RMV, None)

    return parallel.Network(trunk, head)
