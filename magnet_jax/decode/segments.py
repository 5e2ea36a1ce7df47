"""The sampler's program in pieces of a few steps, between which the host looks up.

`sampler.sample` runs a clip from end to end, and nobody can stop it. Here the same steps
(`parallel.step`) run in segments: what a segment hands to the next one stays on the device, and
between two of them the host may tell how far the clip is, listen to it, or leave it. Steps are rows
of an array, so two programs serve any number of them: one for the first codebook, one for the
others. The tokens are those of the whole program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax import programs
from magnet_jax.codec import decoding
from magnet_jax.decode import magnet, parallel, tokens_of_text
from magnet_jax.decode.parallel import State
from magnet_jax.decode.sampler import Inputs, Sampled, Sampler
from magnet_jax.decode.schedule import Schedule
from magnet_jax.model import transformer

STEPS = 5  # of a segment, at most

# What a row of a segment is: nothing, so that all segments have as many; a step; the last step of
# several of a codebook; or its only one.
NO_STEP, STEP, LAST, ONLY = range(4)


class Progress(NamedTuple):
    """How far the clips of a batch are."""

    done: int  # steps
    total: int
    codebook: int  # that was worked on, from 0
    codes_BKT: jax.Array  # mask ids where nothing is known yet


Between = Callable[[Progress], None]


class Carry(NamedTuple):
    """What one segment hands to the next."""

    codes_BKT: jax.Array
    score_BU: jax.Array  # see `parallel.State`
    free_BG: jax.Array


def in_segments(sampler: Sampler) -> bool:
    """Whether a program can be run in segments: that of a MAGNeT on one device."""
    return sampler.mesh is None and sampler.beginning is None


def segments_of(
    schedule: tuple[Schedule, ...], sampler: Sampler, size: int = STEPS
) -> Iterator[tuple[bool, Schedule, np.ndarray]]:
    """The schedule as segments: whether of a codebook above the first, `size` rows, what they are.

    A segment has steps of several codebooks, where those have few.
    """
    rules = sampler.rules
    unlike = rules.spans.on_grid or rules.guided == "all_but_last"
    unlike |= sampler.read_rescorer is not None
    rows: dict[bool, list] = {False: [], True: []}
    for i, part in enumerate(schedule):
        local = i > 0 or rules.first_codebook > 0
        num_steps = part.stage.shape[1]
        kinds = [STEP] * (num_steps - 1) + [LAST if unlike and num_steps > 1 else STEP]
        if num_steps == 1 and sampler.read_rescorer is not None:
            kinds = [ONLY]
        for stage in range(len(part.stage)):
            rows[local] += [
                (jax.tree.map(lambda x, s=stage, t=step: x[s, t], part), kind)
                for step, kind in enumerate(kinds)
            ]
    for local, steps in rows.items():
        for first in range(0, len(steps), size):
            some = steps[first : first + size]
            some += [(some[-1][0], NO_STEP)] * (size - len(some))
            stacked = jax.tree.map(lambda *x: np.stack(x), *(row for row, _ in some))
            yield local, stacked, np.array([kind for _, kind in some], np.int32)


def run(
    inputs: Inputs,
    sampler: Sampler,
    between: Between,
    *,
    what: str,
    say: programs.Say | None = None,
) -> Sampled:
    """`sampler.sample`, with a call of `between` after each segment, which may raise.

    Args:
      inputs, sampler: of which `in_segments` holds.
      between: takes `Progress`.
      what, say: see `programs.call`.
    """
    call = functools.partial(programs.call, what=what, say=say)
    # Without the codec one program of tokens serves clips with and without audio.
    tokens = dataclasses.replace(sampler, codec=None)
    given = inputs._replace(t5=None, codec=None, schedule=(), text=None)
    text, carry = call(begin, inputs._replace(codec=None, schedule=()), sampler=tokens)
    parts = list(segments_of(inputs.schedule, sampler))
    total = sum(int((kinds > NO_STEP).sum()) for _, _, kinds in parts)
    done, hidden = 0, []
    for local, rows, kinds in parts:
        carry, hidden_SBT = call(
            advance, given, text, carry, rows, kinds, sampler=tokens, local=local
        )
        steps = int((kinds > NO_STEP).sum())
        done += steps
        hidden.append(hidden_SBT[:steps])
        between(Progress(done, total, int(rows.stage[steps - 1]), carry.codes_BKT))
    wav_BCN = None
    if sampler.codec is not None:
        wav_BCN = call(
            finish, inputs.codec, carry.codes_BKT, inputs.audio_length, config=sampler.codec,
            frames=sampler.audio_frames, platform=sampler.platform,
        )  # fmt: skip
    return Sampled(carry.codes_BKT, np.concatenate([np.asarray(x) for x in hidden]), wav_BCN)


@functools.partial(jax.jit, static_argnames="sampler")
def begin(inputs: Inputs, *, sampler: Sampler) -> tuple[transformer.TextKeys, Carry]:
    """What all steps need of the texts, and the canvas before the first one."""
    rules, task, dtype = sampler.rules, sampler.task(inputs), sampler.dtype
    states = tokens_of_text.encode(inputs.t5, sampler.t5, inputs.text, dtype=dtype)
    read = transformer.exact_products(magnet.read_texts)
    codes_BKT, given_BKT = inputs.canvas
    codes_BKT = jnp.where(given_BKT, codes_BKT, rules.mask_id)
    state = parallel.start(rules, task, 0)
    text = read(sampler.model, inputs.lm, states, task, rules, dtype=dtype)
    return text, Carry(codes_BKT, state.score_BU, state.free_BG)


@functools.partial(jax.jit, static_argnames=("sampler", "local"), donate_argnames="carry")
def advance(
    inputs: Inputs,
    text: transformer.TextKeys,
    carry: Carry,
    rows: Schedule,
    kinds_S: jax.Array,
    *,
    sampler: Sampler,
    local: bool,
) -> tuple[Carry, jax.Array]:
    """The steps of a segment; and True [S, B, T] where each of them predicted."""
    how = {"sampler": sampler, "local": local, "dtype": sampler.dtype}
    return _advance(inputs, sampler.task(inputs), text, carry, rows, kinds_S, **how)


@transformer.exact_products
def _advance(inputs, task, text, carry, rows, kinds_S, *, sampler, local, dtype):
    rules, (batch, _, num_frames) = sampler.rules, task.canvas.codes_BKT.shape
    network = magnet.network_of_task(
        sampler.model, inputs.lm, text, task, rules, kernels=sampler.kernels,
        savings=sampler.savings,
    )  # fmt: skip

    def take(carry: Carry, row_and_kind: tuple[Schedule, jax.Array]) -> tuple[Carry, jax.Array]:
        row, kind = row_and_kind
        start = parallel.start(rules, task, row.stage)
        held = State(*carry, start.num_units)
        state = jax.tree.map(lambda new, old: jnp.where(row.step == 0, new, old), start, held)
        state = state._replace(codes_BKT=carry.codes_BKT)

        def step(last: bool, only: bool):
            one = functools.partial(parallel.step, network, rules, task)
            return lambda state: one(state, row, local=local, last=last, only=only)

        def nothing(state: State) -> tuple[State, jax.Array]:
            return state, jnp.zeros((batch, num_frames), bool)

        choices = [nothing, step(False, False), step(True, False)]
        choices += [step(False, True)] * (task.rescoring is not None)
        state, hidden_BT = jax.lax.switch(kind, choices, state)
        codes_BKT = state.codes_BKT
        if task.rescoring is not None:
            ended = (kind == LAST) | (kind == ONLY)
            codes_BKT = jnp.where(ended, parallel.checked(rules, state), codes_BKT)
        return Carry(codes_BKT, state.score_BU, state.free_BG), hidden_BT

    return jax.lax.scan(take, carry, (rows, kinds_S))


@functools.partial(jax.jit, static_argnames=("config", "frames", "platform"))
def finish(
    params: dict, codes_BKT: jax.Array, length: jax.Array | None, *, config, frames, platform
) -> jax.Array:
    """Audio of the tokens."""
    return decoding.audio(params, codes_BKT[..., :frames], length, config=config, platform=platform)
