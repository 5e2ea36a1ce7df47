"""From text to tokens in a fixed number of parallel steps (section 3.3, Appendix D).

Codebooks are decoded one after another. Within one, every step hides the least confident spans,
predicts them all at once, and keeps what it did not hide for good (with `stride1`, until a hidden
span overlaps it). The schedules are arrays, computed before the loops; the loops are scans over
stages, steps and layers, so the network is traced four times however many steps there are: for the
first codebook (full attention) and for the others (local attention), each with a last step of its
own, which predicts a single span and needs no guidance. (Others with unlike numbers of steps are
traced apart.)

`Savings` lists what is left out because it changes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.config import DecodeConfig, KernelConfig, ModelConfig
from magnet_jax.model import transformer
from magnet_jax.model.kernels import with_kernels

KEPT = -1e4  # score of a span (stride1: a token) that must not be hidden again
ABSENT = -1e9  # the same past the end of the clip: behind whatever is kept

Choice = Literal["greedy", "top_k", "top_p"]
GuidedSteps = Literal["all", "all_but_last", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Savings:
    """Work that decoding does not do because it changes nothing, each with its share of it.

    Shares are of the operations of a 10 s clip of the 420 M model; docs/performance.md has more.
    """

    null_text: bool = True
    """Rows without text skip cross-attention, which would add exact zeros; 7 %."""
    last_guidance: bool = True
    """Where the guidance coefficient is 1, rows without text are not computed; 3 %."""
    last_window: bool = True
    """A local stage's last step computes the frames that its one span can see; 2 %."""
    masked_head: bool = True
    """Head and sampling at hidden frames alone; 0.2 %, and more of the time."""


ALL_SAVINGS = Savings()
NO_SAVINGS = Savings(null_text=False, last_guidance=False, last_window=False, masked_head=False)


def default_savings(platform: str) -> Savings:
    """The savings that pay on a platform; docs/performance.md has what each is worth where."""
    # A TPU multiplies the heads of all frames in the time that picking the hidden ones takes.
    return dataclasses.replace(ALL_SAVINGS, masked_head=platform != "tpu")


class Schedule(NamedTuple):
    """The steps of neighbouring codebooks that have as many of them; arrays [stages, steps]."""

    stage: np.ndarray  # codebook
    step: np.ndarray  # number of the step within its codebook
    num_hidden: np.ndarray  # spans hidden; stride1: tokens wanted hidden
    guidance: np.ndarray  # coefficient of equation 6
    temperature: np.ndarray
    number: np.ndarray  # of the step in the whole schedule, from 1


class Decoded(NamedTuple):
    codes_BKT: jax.Array  # token ids
    hidden_PBT: jax.Array  # True where step P of the schedule predicted


class Rescoring(NamedTuple):
    """A second model's say in which spans are kept (section 3.3, equation 5 and Figure 4)."""

    probabilities: Callable[..., jax.Array]
    """(codes_BKT, hidden_BT, stage, *, local) -> prob_BT. What the second model gives for the
    tokens of codebook `stage` in a candidate: all codebooks up to that one are there, mask ids
    stand for those above it. `hidden_BT` says which of the codebook's tokens were just predicted
    and may be hidden again; elsewhere the result does not count. `local`: whether stage > 0."""
    weight: jax.Array | float
    """Its share in the scores; the model's own probabilities have the rest."""


class Network(NamedTuple):
    """The model as decoding sees it: what is computed for all frames, and for some."""

    trunk: Callable[..., jax.Array]
    """(codes_BKT, *, stage, local, guided, first_B) -> states_RTD, from which codebook `stage` is
    predicted. R counts the rows with their text and, if `guided`, the same rows without. The codes
    are a whole clip's, `first_B` being None, or each row's from a frame on."""
    head: Callable[..., tuple[jax.Array, jax.Array | None]]
    """(states_RMD, stage, *, guided) -> logits_BMV with text and, or None, without."""


def hidden_rates(steps: int) -> np.ndarray:
    """The share of a codebook's units that each of its steps hides, float32 [steps].

    This is cos(t * pi * 0.5) over linspace(0, 1, steps) as PyTorch rounds it. Rates times units
    are cut to whole numbers, and at 60 degrees the last bit decides on which side of 1/2 they fall.
    """
    if steps == 1:
        return np.ones(1, np.float32)
    step, gap = np.arange(steps), float(np.float32(1) / np.float32(steps - 1))
    # linspace counts its first half from 0, its second half back from 1, by fused multiply-add.
    fraction = np.where(step < steps // 2, gap * step, 1 - gap * (steps - 1 - step))
    angle = fraction.astype(np.float32) * np.float32(np.pi) * np.float32(0.5)
    # The polynomial by which PyTorch computes a cosine as a sine.
    x = np.pi / 2 - angle.astype(np.float64)
    odd = 0.0
    for factor in (
        2.6083159809786594e-6,
        -1.9810690719168633e-4,
        8.333078585565090e-3,
        -0.16666659712791443,
    ):
        odd = (odd + factor) * x * x
    return (x + x * odd).astype(np.float32)


def make_schedule(
    config: DecodeConfig, *, num_frames: int, num_prompt: int | Sequence[int], span_length: int
) -> tuple[Schedule, ...]:
    """What every step does: those of the first codebook, then those of the others.

    Of `num_frames` frames the first `num_prompt` are given, of all codebooks or of each. Others
    that follow each other and have as many steps are together. Where spans do not overlap, the last
    of several steps hides one.
    """
    prompts = [num_prompt] * len(config.steps) if isinstance(num_prompt, int) else num_prompt
    if config.span_arrangement == "nonoverlap":
        units_K = [num_frames // span_length - given // span_length for given in prompts]
        least = 1
    else:
        units_K, least = [num_frames - given for given in prompts], span_length
    groups: list[list[list[tuple]]] = []
    number = 0
    for stage, steps in enumerate(config.steps):
        rows = []
        for step, rate in enumerate(hidden_rates(steps)):
            share = float(rate)
            temperature = config.temperature
            if config.anneal_temperature:
                temperature *= (steps - 1 - step) / steps
            number += 1
            rows.append(
                (
                    stage,
                    step,
                    max(int(rate * np.float32(units_K[stage])), least),
                    share * config.max_guidance + (1 - share) * config.min_guidance,
                    max(temperature, 1e-2),
                    number,
                )
            )
        if stage > 1 and len(groups[-1][0]) == steps:
            groups[-1].append(rows)
        else:
            groups.append([rows])
    types = (np.int32, np.int32, np.int32, np.float32, np.float32, np.int32)
    return tuple(
        Schedule(*(np.array(group)[..., i].astype(type_) for i, type_ in enumerate(types)))
        for group in groups
    )


def guided_steps(config: DecodeConfig, any_text: bool) -> GuidedSteps:
    """Which steps need the rows without text: their logits do not count where the coefficient is 1,
    and are the same as those with text where no row has any."""
    if not any_text or config.min_guidance == config.max_guidance == 1:
        return "none"
    return "all_but_last" if config.min_guidance == 1 else "all"


def _most_probable(
    probs_V: jax.Array, measure: Callable[[jax.Array], jax.Array], limit: jax.Array | float
) -> jax.Array:
    """Keeps the tokens for which the set of strictly more probable ones measures at most `limit`.

    That set grows as a threshold falls, and the lowest threshold that still fits is found by
    bisection over the bits of a float, exactly and without a sort. Renormalised; float32 [..., V].
    """
    high = jnp.full(probs_V.shape[:-1], np.float32(1).view(np.int32))  # above it: within the limit
    low = jnp.full_like(high, -1)  # above it: beyond

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)[..., None]
        within = measure(jnp.where(probs_V > threshold, probs_V, 0.0)) <= limit
        return jnp.where(within, low, middle), jnp.where(within, middle, high)

    _, high = jax.lax.fori_loop(0, 30, halve, (low, high))
    # Where even the whole is within the limit, the search ends below the bits of 0.
    threshold = jax.lax.bitcast_convert_type(jnp.maximum(high, 0), jnp.float32)[..., None]
    kept_V = jnp.where(probs_V >= threshold, probs_V, 0.0)
    return kept_V / kept_V.sum(-1, keepdims=True)


def nucleus(probs_V: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """The nucleus: a token stays while the mass of the more probable ones is at most `top_p`."""
    return _most_probable(probs_V, lambda above_V: above_V.sum(-1), top_p)


def top_k_tokens(probs_V: jax.Array, top_k: jax.Array | float) -> jax.Array:
    """The k most probable tokens, and those as probable as the last of them."""
    return _most_probable(probs_V, lambda above_V: (above_V > 0).sum(-1), top_k - 1)


def choice_of(greedy: bool, top_k: int, top_p: float) -> tuple[Choice, float]:
    """How settings choose tokens, and the number that limits the choice."""
    if greedy:
        return "greedy", 0.0
    return ("top_k", float(top_k)) if top_k else ("top_p", top_p)


def choose_token(
    keys_B: jax.Array, probs_BV: jax.Array, choice: Choice, limit: jax.Array | float
) -> jax.Array:
    """A token for each place, int32 [B] (or [B, ...], if the probabilities are [B, ..., V]).

    Args:
      keys_B: one random key a row.
      probs_BV: probabilities.
      choice: 'greedy' takes the most probable, 'top_k' and 'top_p' sample among the most probable.
      limit: k, or the nucleus mass.

    Where the network's numbers overflowed, all probabilities are NaN, and the mask id V is given in
    place of a token: it stays in the clip, and whoever reads the clip sees it.
    """
    overflown_B = jnp.isnan(probs_BV[..., 0])
    if choice == "greedy":
        token_B = probs_BV.argmax(-1)
    else:
        kept_BV = {"top_k": top_k_tokens, "top_p": nucleus}[choice](probs_BV, limit)
        token_B = jax.vmap(jax.random.categorical)(keys_B, jnp.log(kept_BV))
    return jnp.where(overflown_B, probs_BV.shape[-1], token_B).astype(jnp.int32)


def hide_spans(score_BT: jax.Array, num_hidden: jax.Array, span_length: int) -> jax.Array:
    """True at about `num_hidden` frames: those under the worst spans of any neighbouring frames.

    The `stride1` arrangement of the reference. Spans start at every frame and overlap; how many
    of them hide the wanted number of frames depends on how they lie, and is searched by the
    reference's bisection, here a fixed number of rounds for all rows at once. Which bound is
    taken where, and that the last count tried is used, decides single frames: it is the
    reference's law.
    """
    num_frames = score_BT.shape[-1]
    num_starts = num_frames - span_length + 1
    span_BS = sum(score_BT[:, i : i + num_starts] for i in range(span_length))
    rank_BS = jnp.argsort(jnp.argsort(-span_BS, axis=-1), axis=-1)
    # A frame is hidden by u spans if the worst span over it is among the first u.
    padded = jnp.pad(
        rank_BS, ((0, 0), (span_length - 1, span_length - 1)), constant_values=num_frames
    )
    worst_BT = functools.reduce(
        jnp.minimum, (padded[:, i : i + num_frames] for i in range(span_length))
    )

    def middle(low, high):  # halves are rounded to even
        half = (low + high) // 2
        return half + ((low + high) % 2) * (half % 2)

    def halve(_, bounds):
        low, high, used = bounds
        tried = middle(low, high)
        active = (low < tried) & (tried < high)
        too_many = (worst_BT < tried[:, None]).sum(-1) > num_hidden
        return (
            jnp.where(active & ~too_many, tried, low),
            jnp.where(active & too_many, tried, high),
            jnp.where(active, tried, used),
        )

    low = jnp.full(score_BT.shape[0], num_hidden // span_length)
    high = jnp.full_like(low, num_hidden - span_length + 1)
    rounds = num_frames.bit_length() + 1
    *_, used = jax.lax.fori_loop(0, rounds, halve, (low, high, middle(low, high)))
    return worst_BT < used[:, None]


def sample_keys(seed: jax.Array | int, sample_B: jax.Array) -> jax.Array:
    """One key a sample, from (seed, number of the sample): batching changes nothing."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), sample_B)


def frame_keys(
    keys_B: jax.Array, stage: jax.Array, step: jax.Array, frame_BM: jax.Array
) -> jax.Array:
    """One key [B, M] a frame: no frame's token depends on which others are drawn, or how."""
    fold = jax.random.fold_in
    own = lambda key, frame_M: jax.vmap(fold, (None, 0))(fold(fold(key, stage), step), frame_M)  # noqa: E731
    return jax.vmap(own)(keys_B, frame_BM)


def decode(
    network: Network,
    schedule: tuple[Schedule, ...],
    keys_B: jax.Array,
    codes_BKT: jax.Array,
    num_prompt: jax.Array | Sequence[int] | int,
    limit: jax.Array | float,
    *,
    mask_id: int,
    span_length: int,
    choice: Choice,
    span_score: Literal["max", "prod"],
    span_arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap",
    guided: GuidedSteps = "all",
    length: jax.Array | int | None = None,
    reach: int | None = None,
    savings: Savings = ALL_SAVINGS,
    axis: str | None = None,
    predicts_given: bool = True,
    rescoring: Rescoring | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Decoded:
    """Runs the schedule.

    Args:
      network: the model.
      schedule: from `make_schedule`.
      keys_B: one random key a sample.
      codes_BKT: the given first frames, then mask ids.
      num_prompt: how many frames are given, of all codebooks or of each [K]; they are kept.
      limit: see `choose_token`.
      mask_id: V.
      span_length: frames a span; T must be a multiple of it where spans do not overlap.
      choice: how tokens are chosen.
      span_score, span_arrangement: see `DecodeConfig`.
      guided: from `guided_steps`.
      length: frames of the clip, a whole number of spans; T by default. Later ones keep mask ids.
      reach: frames to each side on which a local stage's logits depend; None is all.
      savings: what to leave out.
      axis: the mesh axis over which the network's states are split by frames.
      predicts_given: whether the network predicts given frames too. Where it does, and no rescorer
        has a share, they count in the score of a span in which the prompt ends, as in AudioCraft;
        else hidden ones alone.
      rescoring: scores spans by a second model as well. It is not asked after a codebook's last
        step, whose scores nothing reads.
      on_step: called with (steps done, steps in all) while the program runs.
    """
    grid = span_arrangement == "nonoverlap"
    batch, num_codebooks, num_frames = codes_BKT.shape
    if num_frames < span_length or (grid and num_frames % span_length):
        raise ValueError(f"{num_frames} frames are no whole number of spans of {span_length}")
    size = num_frames if length is None else length
    frame_T = jnp.arange(num_frames)
    units = num_frames // span_length if grid else num_frames
    width = span_length if grid else 1  # frames a unit
    unit_U = jnp.arange(units)
    prompt_K = jnp.broadcast_to(jnp.asarray(num_prompt), num_codebooks)
    total = sum(part.stage.size for part in schedule)
    window = span_length + 2 * (num_frames if reach is None else reach)
    if guided == "all_but_last" and not savings.last_guidance:
        guided = "all"
    by_surest = span_score == "max" and span_length > 1  # single frames are scored alike by both
    no_say = 0.0 if grid and by_surest else 1.0  # a probability that changes no span's score

    def draw(states_RMD, frame_BM, step, guide):
        """Tokens and their probabilities [B, M] at some frames, of the states there."""
        logits_BMV, without_BMV = network.head(states_RMD, step.stage, guided=guide)
        if guide:
            logits_BMV = without_BMV + step.guidance * (logits_BMV - without_BMV)
        probs_BMV = jax.nn.softmax(logits_BMV.astype(jnp.float32) / step.temperature, axis=-1)
        rows_RV = probs_BMV.reshape(-1, probs_BMV.shape[-1])
        keys_R = frame_keys(keys_B, step.stage, step.step, frame_BM).reshape(-1)
        token_R = choose_token(keys_R, rows_RV, choice, limit)
        prob_R = jnp.take_along_axis(rows_RV, token_R[:, None], axis=-1)
        return token_R.reshape(frame_BM.shape), prob_R.reshape(frame_BM.shape)

    def at_frames(states_RTD, frame_BM, first_B):
        """States at some frames, of states that begin at frames `first_B`."""
        place_RM = jnp.tile(frame_BM - first_B[:, None], (len(states_RTD) // batch, 1))
        return jnp.take_along_axis(states_RTD, place_RM[..., None], axis=1, mode="clip")

    def put(frame_BM, token_BM, prob_BM):
        """Tokens and probabilities at their frames, [B, T]; frames past T are left out."""
        place = (jnp.arange(batch)[:, None], frame_BM)
        token_BT = jnp.zeros((batch, num_frames), jnp.int32).at[place].set(token_BM, mode="drop")
        return token_BT, jnp.ones((batch, num_frames)).at[place].set(prob_BM, mode="drop")

    def spans(unit_BU):
        """The frames of some spans, [B, U * span]."""
        frame_BUS = unit_BU[..., None] * span_length + jnp.arange(span_length)[None, None]
        return frame_BUS.reshape(batch, -1)

    def predict(codes_BKT, order_BU, step, *, local, guide, alone):
        """Tokens and their probabilities [B, T], right at least where something is hidden.

        `order_BU` is the order in which spans are hidden, if they are hidden whole; `alone` says
        that it is the first one alone.
        """
        trunk = functools.partial(network.trunk, stage=step.stage, local=local, guided=guide)
        from_0_B = jnp.zeros(batch, jnp.int32)
        if alone and local and savings.last_window and window < num_frames:
            frame_BM = spans(order_BU[:, :1])
            first_B = jnp.clip(frame_BM[:, 0] - reach, 0, jnp.maximum(size - window, 0))
            cut = jax.vmap(lambda c_KT, first: jax.lax.dynamic_slice_in_dim(c_KT, first, window, 1))
            states_RWD = trunk(cut(codes_BKT, first_B), first_B=first_B)
            drawn = draw(at_frames(states_RWD, frame_BM, first_B), frame_BM, step, guide)
            return put(frame_BM, *drawn)
        states_RTD = trunk(codes_BKT, first_B=None)
        if axis is not None:  # every device draws for its own frames
            share = states_RTD.shape[1]
            own_T = jax.lax.axis_index(axis) * share + jnp.arange(share)
            drawn = draw(states_RTD, jnp.tile(own_T[None], (batch, 1)), step, guide)
            return tuple(jax.lax.all_gather(x_BT, axis, axis=1, tiled=True) for x_BT in drawn)
        if order_BU is None or not savings.masked_head:
            return draw(states_RTD, jnp.tile(frame_T[None], (batch, 1)), step, guide)

        def draw_spans(unit_BU):
            frame_BM = spans(unit_BU)
            return draw(at_frames(states_RTD, frame_BM, from_0_B), frame_BM, step, guide)

        if alone:
            return put(spans(order_BU[:, :1]), *draw_spans(order_BU[:, :1]))
        # Shapes are fixed while the number of hidden spans is not: a quarter of them at a time.
        quarter = -(-units // 4)
        order_BU = jnp.pad(order_BU, ((0, 0), (0, 4 * quarter - units)), constant_values=units)

        def draw_quarter(_, first):
            unit_BU = jax.lax.dynamic_slice_in_dim(order_BU, first, quarter, axis=1)
            frame_BM = spans(unit_BU)
            nothing = (jnp.zeros(frame_BM.shape, jnp.int32), jnp.ones(frame_BM.shape))
            drawn = jax.lax.cond(first < step.num_hidden, draw_spans, lambda _: nothing, unit_BU)
            return None, (frame_BM, *drawn)

        _, drawn = jax.lax.scan(draw_quarter, None, jnp.arange(4) * quarter)
        return put(*(jnp.moveaxis(x, 0, 1).reshape(batch, -1) for x in drawn))

    def advance(carry, step, *, local, guide, last, alone=False):
        codes_BKT, score_BU = carry
        order_BU = None
        if grid:
            order_BU = jnp.argsort(-score_BU, axis=-1)
            place = (jnp.arange(batch)[:, None], order_BU)
            hidden_BU = (
                jnp.zeros((batch, units), bool).at[place].set(unit_U[None] < step.num_hidden)
            )
            hidden_BT = jnp.repeat(hidden_BU, span_length, axis=-1)
        else:
            hidden_BT = hide_spans(score_BU, step.num_hidden, span_length)
        # A prompt that ends within a span is written back where its span was hidden.
        hidden_BT = hidden_BT & (frame_T >= prompt_K[step.stage])[None]
        row_BT = jax.lax.dynamic_index_in_dim(codes_BKT, step.stage, axis=1, keepdims=False)
        # What no step has reached yet is predicted too: stride1 may leave some at the first step.
        hidden_BT = hidden_BT | ((row_BT == mask_id) & (frame_T < size)[None])
        row_BT = jnp.where(hidden_BT, mask_id, row_BT)
        codes_BKT = jax.lax.dynamic_update_index_in_dim(codes_BKT, row_BT, step.stage, axis=1)

        token_BT, prob_BT = predict(
            codes_BKT, order_BU, step, local=local, guide=guide, alone=alone
        )
        row_BT = jnp.where(hidden_BT, token_BT, row_BT)
        codes_BKT = jax.lax.dynamic_update_index_in_dim(codes_BKT, row_BT, step.stage, axis=1)

        if not predicts_given:
            prob_BT = jnp.where(hidden_BT, prob_BT, no_say)
        if rescoring is not None and not last:
            other_BT = rescoring.probabilities(codes_BKT, hidden_BT, step.stage, local=local)
            # In this form, weights of 0 and 1 leave the bits of one side as they are.
            mixed_BT = (1 - rescoring.weight) * prob_BT + rescoring.weight * other_BT
            # Given frames have no say, unless the weight of 0 asks for what no rescorer does.
            given_BT = jnp.where(rescoring.weight > 0, no_say, prob_BT)
            prob_BT = jnp.where(hidden_BT, mixed_BT, given_BT)
        surprise_BT = -jnp.log(jnp.maximum(prob_BT, 1e-30))
        if not grid:
            score_BU = jnp.where(hidden_BT, surprise_BT, jnp.minimum(score_BU, KEPT))
        else:
            in_spans = (batch, units, span_length)
            if by_surest:
                new_BU = 1 - prob_BT.reshape(in_spans).max(-1)
            else:
                new_BU = surprise_BT.reshape(in_spans).sum(-1)
            score_BU = jnp.where(hidden_BU, new_BU, jnp.minimum(score_BU, KEPT))
        if on_step is not None:
            # Tied to the tokens, so that it is called when they are there.
            number, _ = jax.lax.optimization_barrier((step.number, row_BT))
            jax.debug.callback(on_step, number, total)
        return (codes_BKT, score_BU), hidden_BT

    def decode_stage(codes_BKT, steps: Schedule, *, local: bool):
        num_steps = len(steps.stage)
        start_U = jnp.where(unit_U < prompt_K[steps.stage[0]] // width, KEPT, 0.0)
        start_U = jnp.where(unit_U < size // width, start_U, ABSENT)
        start = jnp.broadcast_to(start_U[None], (batch, units))
        unlike = grid or guided == "all_but_last" or rescoring is not None
        last_apart = num_steps > 1 and unlike
        first_steps = jax.tree.map(lambda x: x[: num_steps - last_apart], steps)
        run = functools.partial(advance, local=local, guide=guided != "none", last=num_steps == 1)
        carry, hidden_PBT = jax.lax.scan(run, (codes_BKT, start), first_steps)
        if last_apart:
            run = functools.partial(
                advance, local=local, guide=guided == "all", last=True, alone=grid
            )
            carry, last_BT = run(carry, jax.tree.map(lambda x: x[-1], steps))
            hidden_PBT = jnp.concatenate([hidden_PBT, last_BT[None]])
        codes_BKT, score_BU = carry
        if rescoring is not None:  # as in `choose_token`, of the second model's numbers
            overflown_B = jnp.isnan(score_BU).any(-1)
            codes_BKT = jnp.where(overflown_B[:, None, None], mask_id, codes_BKT)
        return codes_BKT, hidden_PBT

    hidden = []
    for i, part in enumerate(schedule):
        decode_part = functools.partial(decode_stage, local=i > 0)
        codes_BKT, hidden_SPBT = jax.lax.scan(decode_part, codes_BKT, part)
        hidden.append(hidden_SPBT.reshape(-1, batch, num_frames))
    return Decoded(codes_BKT, jnp.concatenate(hidden))


def guided_network(
    config: ModelConfig,
    params: dict,
    text: transformer.TextKeys,
    num_frames: int,
    *,
    kernels: KernelConfig,
    length: jax.Array | int | None = None,
    savings: Savings = ALL_SAVINGS,
    guidance_axis: str | None = None,
    frames_axis: str | None = None,
) -> Network:
    """The transformer as `decode` wants it.

    Args:
      config, params, text: the model and its texts.
      num_frames: of a whole clip.
      kernels: from `kernels.choose_kernels`.
      length: frames that exist; all by default.
      savings: see `Savings`; of them `null_text` is the network's.
      guidance_axis: mesh axis of two devices, of which the second computes the rows without text.
      frames_axis: mesh axis over which the frames are split.
    """
    # One array for all uses: as constants they would be in the program once a use.
    position_TD = jnp.asarray(transformer.sinusoids(num_frames, config.width))

    def twice(x):
        return jnp.concatenate([x, x])

    # The general path. A model with biases in attention takes it whatever may be saved: to it, no
    # text is something. With norms of queries and keys alone the values of no text are still zeros.
    null_rows = transformer.with_null_rows(text)
    null_text = savings.null_text and config.null_text_adds_nothing

    def trunk(codes_BKT, *, stage, local, guided, first_B):
        rows_text = text
        if guided and guidance_axis is not None:
            here = jax.lax.axis_index(guidance_axis) == 0
            rows_text = text._replace(
                mask_BS=text.mask_BS & here,
                num_zero_keys_B=jnp.where(here, text.num_zero_keys_B, 0),
            )
        elif guided:
            codes_BKT, rows_text = twice(codes_BKT), text if null_text else null_rows
            first_B = None if first_B is None else twice(first_B)
        near = config.context(local) is not None  # a model may see everything at all stages
        attend = with_kernels(kernels, near=near)
        positions_BTD, num_frames = position_TD[None], codes_BKT.shape[-1]
        if first_B is not None:
            positions_BTD = position_TD[first_B[:, None] + jnp.arange(num_frames)[None]]
            attend = functools.partial(attend, length=None if length is None else length - first_B)
        elif frames_axis is not None:
            share = num_frames // jax.lax.axis_size(frames_axis)
            first = jax.lax.axis_index(frames_axis) * share
            positions_BTD = jax.lax.dynamic_slice_in_dim(positions_BTD, first, share, axis=1)
            codes_BKT = jax.lax.dynamic_slice_in_dim(codes_BKT, first, share, axis=-1)
            whole = num_frames if length is None else length
            attend = functools.partial(attend, axis=frames_axis, length=whole)
        else:
            attend = functools.partial(attend, length=length)
        return transformer.bind(config, params).trunk(
            codes_BKT,
            rows_text,
            local=local,
            attend=attend,
            positions_BTD=positions_BTD,
        )

    def head(states_RMD, stage, *, guided):
        logits_RMV = transformer.bind(config, params).head(states_RMD, stage)
        if not guided:
            return logits_RMV, None
        if guidance_axis is not None:
            return tuple(jax.lax.all_gather(logits_RMV, guidance_axis))
        return tuple(jnp.split(logits_RMV, 2))

    return Network(trunk, head)


def round_weights(params: dict, dtype: jnp.dtype) -> dict:
    """Parameters, of the transformer or of T5, with factors of products rounded once for all.

    Norms, biases and embeddings, which are no such factors, keep their precision.
    """

    def rounded(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        keep = name == "embed" or name.endswith(("/scale", "bias"))
        return leaf if keep else leaf.astype(dtype)

    return jax.tree.map_with_path(rounded, params)


@transformer.exact_products
def generate(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    keys_B: jax.Array,
    codes_BKT: jax.Array,
    num_prompt: jax.Array | int,
    schedule: tuple[Schedule, ...],
    limit: jax.Array | float,
    *,
    config: ModelConfig,
    kernels: KernelConfig,
    choice: Choice,
    span_score: Literal["max", "prod"],
    span_arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap",
    guided: GuidedSteps = "all",
    length: jax.Array | int | None = None,
    dtype: jnp.dtype = jnp.float32,
    savings: Savings = ALL_SAVINGS,
    guidance_axis: str | None = None,
    frames_axis: str | None = None,
    rescoring: Rescoring | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Decoded:
    """From text encoder states to tokens; to be traced.

    Args:
      params: the transformer's parameters.
      states_BSE, text_mask_BS: text encoder states and which of them are tokens; a row without
        any is generated unconditionally. Of no rows at all, no clip has a text.
      num_zero_keys_B: see `attention.cross_attention`; zeros make samples independent.
      keys_B: from `sample_keys`.
      schedule: from `make_schedule`; its numbers may change without a new program.
      dtype: precision of the matrix products.
      codes_BKT, num_prompt, limit, choice, span_score, span_arrangement, guided, length, savings,
        rescoring, on_step: see `decode`.
      kernels, guidance_axis, frames_axis: see `guided_network`.
    """
    model = transformer.bind(config, params)
    text = model.read_text(states_BSE, text_mask_BS, num_zero_keys_B, dtype=dtype)
    return decode(
        guided_network(
            config,
            params,
            text,
            codes_BKT.shape[-1],
            kernels=kernels,
            length=length,
            savings=savings,
            guidance_axis=guidance_axis,
            frames_axis=frames_axis,
        ),
        schedule,
        keys_B,
        codes_BKT,
        num_prompt,
        limit,
        mask_id=config.mask_id,
        span_length=config.span_length,
        choice=choice,
        span_score=span_score,
        span_arrangement=span_arrangement,
        guided=guided,
        length=length,
        reach=config.num_layers * config.local_context or None,
        savings=savings,
        axis=frames_axis,
        rescoring=rescoring,
        on_step=on_step,
    )
