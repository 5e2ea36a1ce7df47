"""Parallel decoding: a fixed number of steps fills a canvas with tokens (section 3.3, Appendix D).

Codebooks are decoded one after another. Within one, every step hides the least confident spans of
what is free, predicts them all at once, and keeps what it did not hide for good (with `stride1`,
until a hidden span overlaps it). The loops are scans over stages, steps and layers, so the network
is traced four times however many steps there are: for the first codebook (full attention) and for
the others (local attention), each with a last step of its own, which predicts a single span and
needs no guidance. Others with unlike numbers of steps are traced apart.

The decoder knows the network as a function, and nothing of texts, meshes or codecs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from magnet_jax.decode import choose, spans
from magnet_jax.decode import ring as rings
from magnet_jax.decode.canvas import Canvas
from magnet_jax.decode.choose import Choice
from magnet_jax.decode.joint import Windows
from magnet_jax.decode.schedule import MIN_TEMPERATURE, GuidedSteps, OwnSteps, Schedule
from magnet_jax.decode.spans import Order, Spans


class Network(NamedTuple):
    """The model as decoding sees it: what is computed for all frames, and for some."""

    trunk: Callable[..., jax.Array]
    """(codes_BKT, *, stage, local, guided, first_B) -> states_RTD, from which codebook `stage` is
    predicted. R counts the rows with their text and, if `guided`, the same rows without. The codes
    are a whole clip's, `first_B` being None, or each row's from a frame on; of a ring there is
    `frame_1T` as well, which frames of it these are."""
    head: Callable[..., tuple[jax.Array, jax.Array | None]]
    """(states_RMD, stage, *, guided) -> logits_BMV with text and, or None, without."""


class Rescoring(NamedTuple):
    """A second model's say in which spans are kept (section 3.3, equation 5 and Figure 4)."""

    probabilities: Callable[..., jax.Array]
    """(codes_BKT, hidden_BT, stage, *, local) -> prob_BT. What the second model gives for the
    tokens of codebook `stage` in a candidate: all codebooks up to that one are there, mask ids
    stand for those above it. `hidden_BT` says which of the codebook's tokens were just predicted
    and may be hidden again; elsewhere the result does not count. `local`: whether stage > 0."""
    weight: jax.Array | float
    """Its share in the scores; the model's own probabilities have the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How a canvas is decoded, as far as a program is made for it."""

    mask_id: int
    """V, which stands for a token that is not known."""
    spans: Spans
    choice: Choice
    guided: GuidedSteps = "all"
    """From `schedule.guided_steps`."""
    reach: int | None = None
    """Frames to each side on which a local stage's logits depend, and which alone are computed at
    its last step, for the one span that is left; None is all."""
    given_have_say: bool = True
    """Whether given frames count in the score of a span that is given in part, as in AudioCraft.
    With a rescorer, or a network that does not predict them, they do not."""
    above_hidden: bool = False
    """Whether the network sees mask ids above the codebook that is predicted, as in training.
    AudioCraft shows it what is given there."""
    order: Order = "confidence"
    """Which units are kept first: those that the model is surest of, any, or far from each other
    (`spans.priority`)."""
    first_codebook: int = 0
    """The codebooks below are given as a whole, and have no steps in the schedule."""
    extent: int | None = None
    """Frames from `Task.first_B` on within which local stages have anything to predict; None is
    all. What cannot be seen from there is not computed."""
    ring: rings.Ring | None = None
    """How the clip is heard whose last frame leads to its first, one of `Task.end` frames."""
    windows: Windows | None = None
    """Those that share the canvas, of which a frame's states are the mean."""
    frames_axis: str | None = None
    """The mesh axis over which the network's states are split by frames."""
    on_step: Callable[[int, int], None] | None = None
    """Called with (steps done, steps in all) while the program runs."""


class Task(NamedTuple):
    """What is decoded."""

    canvas: Canvas
    keys_B: jax.Array  # from `choose.sample_keys`
    limit: jax.Array | float  # see `choose.choose_token`, or `replay`; one for all, or [B]
    origin_B: jax.Array | None = None  # a canvas's first frame, as random numbers count; None is 0
    length: jax.Array | int | None = None  # frames that exist, in whole spans; None is all
    end: jax.Array | int | None = None  # frames of the clip, whose last span may be cut; likewise
    rescoring: Rescoring | None = None
    first_B: jax.Array | None = None  # see `Rules.extent`
    replayed_BKT: jax.Array | None = None  # tokens of both halves of the rows, see `choose.replay`
    min_guidance: jax.Array | None = None  # where the schedule goes by what is known, `annealed`
    own_steps: OwnSteps | None = None  # of clips that have fewer steps than the schedule

    @property
    def exists_T(self) -> jax.Array:
        num_frames = self.canvas.codes_BKT.shape[-1]
        return jnp.arange(num_frames) < (num_frames if self.length is None else self.length)


class Decoded(NamedTuple):
    codes_BKT: jax.Array  # token ids; mask ids where no frame exists
    hidden_PBT: jax.Array  # True where step P of the schedule predicted


class State(NamedTuple):
    """What one step hands to the next."""

    codes_BKT: jax.Array
    score_BU: jax.Array  # how unsure each unit of the stage's codebook is
    free_BG: jax.Array  # units of that codebook that are not given, of each stretch
    num_units: jax.Array  # units that exist


def codebook(x_BKT: jax.Array, stage: jax.Array) -> jax.Array:
    """[B, T] of one codebook."""
    return jax.lax.dynamic_index_in_dim(x_BKT, stage, axis=1, keepdims=False)


def with_codebook(x_BKT: jax.Array, x_BT: jax.Array, stage: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x_BKT, x_BT, stage, axis=1)


def annealed(task: Task, state: State, row: Schedule) -> Schedule:
    """The step as each clip has it: guidance and temperature are scalars, or [B, 1, 1].

    Clips with steps of their own are each at another one, or have not begun.

    The schedule anneals both from a clip of which nothing is known. Where most of it is given, the
    model is sure from the first step on, and what suits a blank canvas would be far too much. So
    both are those of the step of a whole clip that hides as large a share of it.
    """
    if task.own_steps is not None:
        step, rate, guidance, temperature = (x[:, row.stage, row.step] for x in task.own_steps)
        row = row._replace(step=step, rate=rate, guidance=guidance, temperature=temperature)
    guidance_B, temperature_B = row.guidance, row.temperature
    if task.min_guidance is not None:
        free_B = state.free_BG.sum(-1)
        share_B = free_B / state.num_units
        left = lambda rate: 1 - jnp.arccos(jnp.clip(rate, 0, 1)) * (2 / jnp.pi)  # noqa: E731
        guidance_B = task.min_guidance + (row.guidance - task.min_guidance) * share_B
        cooler_B = left(row.rate * share_B) / jnp.maximum(left(row.rate), 1e-6)
        temperature_B = jnp.maximum(row.temperature * cooler_B, MIN_TEMPERATURE)
        whole_B = free_B == state.num_units  # then it is the schedule, to the bit
        guidance_B = jnp.where(whole_B, row.guidance, guidance_B)
        temperature_B = jnp.where(whole_B, row.temperature, temperature_B)
    if task.min_guidance is None and task.own_steps is None:
        return row
    return row._replace(
        guidance=guidance_B[:, None, None], temperature=temperature_B[:, None, None]
    )


def draw(
    network: Network,
    rules: Rules,
    task: Task,
    states_RMD: jax.Array,
    frame_BM: jax.Array,
    row: Schedule,
    guided: bool,
) -> tuple[jax.Array, jax.Array]:
    """Tokens and their probabilities [B, M] at some frames, from the states there."""
    logits_BMV = choose.guide(*network.head(states_RMD, row.stage, guided=guided), row.guidance)
    probs_BMV = jax.nn.softmax(logits_BMV.astype(jnp.float32) / row.temperature, axis=-1)
    probs_RV = probs_BMV.reshape(-1, probs_BMV.shape[-1])
    drawn_BM = frame_BM if task.origin_B is None else frame_BM + task.origin_B[:, None]
    keys_R = choose.frame_keys(task.keys_B, row.stage, row.step, drawn_BM).reshape(-1)
    if task.replayed_BKT is not None:
        codes_BT = codebook(task.replayed_BKT, row.stage)
        said_R = jnp.take_along_axis(codes_BT, frame_BM, axis=1, mode="clip").reshape(-1)
        token_R = choose.replay(keys_R, probs_RV, said_R, task.limit)
    else:
        limit = task.limit
        if jnp.ndim(limit):  # one a clip
            limit = jnp.repeat(limit, frame_BM.shape[1])
        token_R = choose.choose_token(keys_R, probs_RV, rules.choice, limit)
    prob_R = jnp.take_along_axis(probs_RV, token_R[:, None], axis=-1)
    return token_R.reshape(frame_BM.shape), prob_R.reshape(frame_BM.shape)


def predict(
    network: Network,
    rules: Rules,
    task: Task,
    codes_BKT: jax.Array,
    row: Schedule,
    *,
    local: bool,
    guided: bool,
) -> tuple[jax.Array, jax.Array]:
    """Tokens of codebook `row.stage` at all frames, and their probabilities, [B, T]."""
    batch, _, num_frames = codes_BKT.shape
    how, home_T = {"stage": row.stage, "local": local, "guided": guided, "first_B": None}, None
    if rules.ring is not None:
        around = rules.ring.around[local]
        place_W, home_T = rings.view(rules.ring, num_frames, task.end, row.number, around=around)
        codes_BKT, how["frame_1T"] = codes_BKT[..., place_W], place_W[None]
    states_RTD = network.trunk(codes_BKT, **how)
    states_RTD = states_RTD if home_T is None else states_RTD[:, home_T]
    frame_T = jnp.arange(num_frames)
    if rules.frames_axis is not None:  # every device draws for its own frames
        share = states_RTD.shape[1]
        frame_T = jax.lax.axis_index(rules.frames_axis) * share + jnp.arange(share)
    frame_BT = jnp.broadcast_to(frame_T[None], (batch, frame_T.size))
    drawn = draw(network, rules, task, states_RTD, frame_BT, row, guided)
    if rules.frames_axis is None:
        return drawn
    return tuple(jax.lax.all_gather(x, rules.frames_axis, axis=1, tiled=True) for x in drawn)


def predict_within(
    network: Network,
    rules: Rules,
    task: Task,
    codes_BKT: jax.Array,
    row: Schedule,
    *,
    begin_B: jax.Array,
    count: int,
    guided: bool,
) -> tuple[jax.Array, jax.Array]:
    """`predict` of `count` frames a row at a local stage, from the frames that they can see.

    Elsewhere tokens are mask ids and probabilities 1.
    """
    batch, _, num_frames = codes_BKT.shape
    window = count + 2 * rules.reach
    size = num_frames if task.length is None else task.length
    frame_BM = begin_B[:, None] + jnp.arange(count)[None]
    first_B = jnp.clip(begin_B - rules.reach, 0, jnp.maximum(size - window, 0))
    cut = jax.vmap(lambda c_KT, first: jax.lax.dynamic_slice_in_dim(c_KT, first, window, 1))
    states_RWD = network.trunk(
        cut(codes_BKT, first_B), stage=row.stage, local=True, guided=guided, first_B=first_B
    )
    place_RM = jnp.tile(frame_BM - first_B[:, None], (len(states_RWD) // batch, 1))
    states_RMD = jnp.take_along_axis(states_RWD, place_RM[..., None], axis=1, mode="clip")
    token_BM, prob_BM = draw(network, rules, task, states_RMD, frame_BM, row, guided)
    place = (jnp.arange(batch)[:, None], frame_BM)
    token_BT = jnp.full((batch, num_frames), rules.mask_id).at[place].set(token_BM, mode="drop")
    return token_BT, jnp.ones((batch, num_frames)).at[place].set(prob_BM, mode="drop")


def rescored(
    rules: Rules,
    task: Task,
    state_codes_BKT: jax.Array,
    hidden_BT: jax.Array,
    prob_BT: jax.Array,
    row: Schedule,
    *,
    local: bool,
) -> jax.Array:
    """The probabilities that decide what is kept where a second model has a say (equation 5)."""
    rescoring, num_frames = task.rescoring, hidden_BT.shape[-1]
    if rules.ring is None:
        other_BT = rescoring.probabilities(state_codes_BKT, hidden_BT, row.stage, local=local)
    else:
        place_W, home_T = rings.view(rules.ring, num_frames, task.end, row.number, around=False)
        seen = state_codes_BKT[..., place_W], hidden_BT[:, place_W]
        other_BT = rescoring.probabilities(*seen, row.stage, local=local)[:, home_T]
    # In this form, weights of 0 and 1 leave the bits of one side as they are.
    mixed_BT = (1 - rescoring.weight) * prob_BT + rescoring.weight * other_BT
    # Given frames have no say, unless the weight of 0 asks for what no rescorer does.
    given_BT = jnp.where(rescoring.weight > 0, rules.spans.no_say, prob_BT)
    return jnp.where(hidden_BT, mixed_BT, given_BT)


def step(
    network: Network,
    rules: Rules,
    task: Task,
    state: State,
    row: Schedule,
    *,
    local: bool,
    last: bool,
    only: bool,
) -> tuple[State, jax.Array]:
    """Hides the worst of what is free, predicts it, and scores what was predicted.

    `local` is whether this is a stage above the first; `last` and `only` whether it is its
    codebook's last step of several, or the only one. Returns the state, and hidden_BT, True where
    tokens were predicted.
    """
    given_BT = codebook(task.canvas.given_BKT, row.stage)
    codes_BT = codebook(state.codes_BKT, row.stage)
    row = annealed(task, state, row)
    count_BG = spans.count(rules.spans, jnp.reshape(row.rate, (-1, 1)), state.free_BG)
    hidden_BU = spans.hide(rules.spans, state.score_BU, count_BG)
    # Given frames of a span that is hidden stay. What no step has reached yet is predicted too:
    # stride1 may leave some at the first step.
    unknown_BT = (codes_BT == rules.mask_id) & task.exists_T[None]
    hidden_BT = (spans.frames(rules.spans, hidden_BU) | unknown_BT) & ~given_BT
    codes_BT = jnp.where(hidden_BT, rules.mask_id, codes_BT)
    codes_BKT = with_codebook(state.codes_BKT, codes_BT, row.stage)

    seen_BKT = codes_BKT
    if rules.above_hidden:
        above_K = jnp.arange(codes_BKT.shape[1]) > row.stage
        seen_BKT = jnp.where(above_K[None, :, None], rules.mask_id, codes_BKT)
    guided = rules.guided == "all" or (rules.guided == "all_but_last" and not last)
    count, begin_B = rules.extent, task.first_B
    if last and rules.spans.on_grid and rules.reach:
        count, begin_B = rules.spans.length, hidden_BU.argmax(-1) * rules.spans.length
    if local and count and rules.reach and count + 2 * rules.reach < codes_BT.shape[-1]:
        drawn = functools.partial(predict_within, begin_B=begin_B, count=count)
    else:
        drawn = functools.partial(predict, local=local)
    token_BT, prob_BT = drawn(network, rules, task, seen_BKT, row, guided=guided)
    codes_BT = jnp.where(hidden_BT, token_BT, codes_BT)
    codes_BKT = with_codebook(codes_BKT, codes_BT, row.stage)

    if not rules.given_have_say:
        prob_BT = jnp.where(hidden_BT, prob_BT, rules.spans.no_say)
    if task.rescoring is not None and not (last or only):
        prob_BT = rescored(rules, task, codes_BKT, hidden_BT, prob_BT, row, local=local)
    scored_BU = hidden_BU if rules.spans.on_grid else hidden_BT
    kept_BU = jnp.minimum(state.score_BU, spans.KEPT)
    if rules.order == "confidence":
        unsure_BU = spans.measure(rules.spans, prob_BT)
    else:
        unsure_BU = spans.priority(rules.order, task.keys_B, row.stage, scored_BU.shape[-1])
    score_BU = jnp.where(scored_BU, unsure_BU, kept_BU)
    if task.own_steps is not None:  # who has not begun waits
        waits_B = row.step < 0
        codes_BKT = jnp.where(waits_B[:, None, None], state.codes_BKT, codes_BKT)
        score_BU = jnp.where(waits_B[:, None], state.score_BU, score_BU)
        hidden_BT &= ~waits_B[:, None]
    return state._replace(codes_BKT=codes_BKT, score_BU=score_BU), hidden_BT


def start(rules: Rules, task: Task, stage: jax.Array) -> State:
    """The state before the first step of codebook `stage`; its tokens are those of the canvas."""
    free_BT = ~codebook(task.canvas.given_BKT, stage)
    if task.end is not None:  # what is cut off makes no span worth a step
        free_BT &= (jnp.arange(free_BT.shape[-1]) < task.end)[None]
    return State(task.canvas.codes_BKT, *spans.start(rules.spans, free_BT, task.exists_T))


def checked(rules: Rules, state: State) -> jax.Array:
    """The tokens after a codebook; as in `choose_token`, but of the second model's numbers."""
    overflown_B = jnp.isnan(state.score_BU).any(-1)
    return jnp.where(overflown_B[:, None, None], rules.mask_id, state.codes_BKT)


def decode(network: Network, rules: Rules, task: Task, schedule: tuple[Schedule, ...]) -> Decoded:
    """Runs the schedule over a canvas; T is a multiple of the spans' length unless they overlap."""
    given_BKT = task.canvas.given_BKT
    num_frames, span_length = given_BKT.shape[-1], rules.spans.length
    if num_frames < span_length or (rules.spans.on_grid and num_frames % span_length):
        raise ValueError(f"{num_frames} frames are no whole number of spans of {span_length}")
    codes_BKT = jnp.where(given_BKT, task.canvas.codes_BKT, rules.mask_id)
    total = sum(part.stage.size for part in schedule)

    def run(state: State, row: Schedule, **which: bool) -> tuple[State, jax.Array]:
        state, hidden_BT = step(network, rules, task, state, row, **which)
        if rules.on_step is not None:
            # Tied to the tokens, so that it is called when they are there.
            number, _ = jax.lax.optimization_barrier((row.number, state.codes_BKT))
            jax.debug.callback(rules.on_step, number, total)
        return state, hidden_BT

    def decode_stage(codes_BKT: jax.Array, rows: Schedule, *, local: bool):
        """All steps of one codebook; the last of several is traced apart where it is unlike."""
        state = start(rules, task, rows.stage[0])._replace(codes_BKT=codes_BKT)
        num_steps = len(rows.stage)
        unlike = rules.spans.on_grid or rules.guided == "all_but_last" or task.rescoring is not None
        apart = num_steps > 1 and unlike
        first = functools.partial(run, local=local, last=False, only=num_steps == 1)
        state, hidden_PBT = jax.lax.scan(
            first,
            state,
            jax.tree.map(lambda x: x[: num_steps - apart], rows),
        )
        if apart:
            row = jax.tree.map(lambda x: x[-1], rows)
            state, last_BT = run(state, row, local=local, last=True, only=False)
            hidden_PBT = jnp.concatenate([hidden_PBT, last_BT[None]])
        codes_BKT = state.codes_BKT if task.rescoring is None else checked(rules, state)
        return codes_BKT, hidden_PBT

    hidden = []
    for i, part in enumerate(schedule):
        run_part = functools.partial(decode_stage, local=i > 0 or rules.first_codebook > 0)
        codes_BKT, hidden_SPBT = jax.lax.scan(run_part, codes_BKT, part)
        hidden.append(hidden_SPBT.reshape(-1, *hidden_SPBT.shape[2:]))
    return Decoded(codes_BKT, jnp.concatenate(hidden))
