"""From text to tokens in a fixed number of parallel steps (section 3.3, Appendix D).

Codebooks are decoded one after another. Within one, every step hides the least confident spans,
predicts them all at once, and keeps what it did not hide for good (with `stride1`, until a hidden
span overlaps it). The schedules are arrays,
computed before the loop; the loop is two scans, one for the first codebook (full attention) and one
for all others (local attention), so the network is traced twice whatever the number of steps.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax import transformer
from magnet_jax.config import DecodeConfig, ModelConfig

KEPT = -1e4  # score of a span (stride1: a token) that must not be hidden again

Choice = Literal["greedy", "top_k", "top_p"]


class Schedule(NamedTuple):
    """One entry a decoding step."""

    stage: np.ndarray  # codebook
    step: np.ndarray  # number of the step within its codebook
    num_hidden: np.ndarray  # spans hidden; stride1: tokens wanted hidden
    guidance: np.ndarray  # coefficient of equation 6
    temperature: np.ndarray


class Decoded(NamedTuple):
    codes_BKT: jax.Array  # token ids
    hidden_PBT: jax.Array  # True where step P of the schedule predicted


def make_schedule(
    config: DecodeConfig, *, num_frames: int, num_prompt: int, span_length: int
) -> tuple[Schedule, Schedule]:
    """What every step does: those of the first codebook, and those of all others in turn.

    Of `num_frames` frames the first `num_prompt` are given.
    """
    if config.span_arrangement == "nonoverlap":
        units, least = num_frames // span_length - num_prompt // span_length, 1
    else:
        units, least = num_frames - num_prompt, span_length
    rows = []
    for stage, steps in enumerate(config.steps):
        for step in range(steps):
            fraction = np.float32(step / (steps - 1)) if steps > 1 else np.float32(0)
            rate = np.cos(np.float32(np.pi / 2) * fraction)
            temperature = config.temperature
            if config.anneal_temperature:
                temperature *= (steps - 1 - step) / steps
            rows.append(
                (
                    stage,
                    step,
                    max(int(rate * units), least),
                    rate * config.max_guidance + (1 - rate) * config.min_guidance,
                    max(temperature, 1e-2),
                )
            )
    types = (np.int32, np.int32, np.int32, np.float32, np.float32)
    columns = [np.asarray(column, type_) for column, type_ in zip(zip(*rows), types, strict=True)]
    whole, first = Schedule(*columns), config.steps[0]
    return Schedule(*(c[:first] for c in whole)), Schedule(*(c[first:] for c in whole))


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
    keys_B: jax.Array, probs_BTV: jax.Array, choice: Choice, limit: jax.Array | float
) -> jax.Array:
    """A token for each place, [B, T] int32.

    Args:
      keys_B: one random key a row.
      probs_BTV: probabilities.
      choice: 'greedy' takes the most probable, 'top_k' and 'top_p' sample among the most probable.
      limit: k, or the nucleus mass.
    """
    if choice == "greedy":
        return probs_BTV.argmax(-1).astype(jnp.int32)
    probs_BTV = {"top_k": top_k_tokens, "top_p": nucleus}[choice](probs_BTV, limit)
    return jax.vmap(jax.random.categorical)(keys_B, jnp.log(probs_BTV)).astype(jnp.int32)


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


def decode(
    network: Callable[[jax.Array, jax.Array, bool], tuple[jax.Array, jax.Array]],
    schedule: tuple[Schedule, Schedule],
    keys_B: jax.Array,
    prompt_BKP: jax.Array,
    limit: jax.Array | float,
    *,
    num_frames: int,
    mask_id: int,
    span_length: int,
    choice: Choice,
    span_score: Literal["max", "prod"],
    span_arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap",
    on_step: Callable[[int, int], None] | None = None,
) -> Decoded:
    """Runs the schedule.

    Args:
      network: (codes_BKT, stage, local) -> logits of that stage with and without text,
        each [B, T, V].
      schedule: from `make_schedule`.
      keys_B: one random key a sample.
      prompt_BKP: given first frames, P may be 0; kept in every codebook.
      limit: see `choose_token`.
      num_frames: T; a multiple of `span_length` where spans do not overlap.
      mask_id: V.
      span_length: frames a span.
      choice: how tokens are chosen.
      span_score, span_arrangement: see `DecodeConfig`.
      on_step: called with (steps done, steps in all) while the program runs.
    """
    grid = span_arrangement == "nonoverlap"
    if num_frames < span_length or (grid and num_frames % span_length):
        raise ValueError(f"{num_frames} frames are no whole number of spans of {span_length}")
    batch, num_codebooks, num_prompt = prompt_BKP.shape
    if num_prompt >= num_frames:
        raise ValueError(f"a prompt of {num_prompt} frames leaves nothing of {num_frames}")
    num_spans = num_frames // span_length
    given = np.arange(num_spans) < num_prompt // span_length
    given = given if grid else np.arange(num_frames) < num_prompt
    start = jnp.broadcast_to(jnp.where(given, KEPT, 0.0), (batch, len(given)))
    total = sum(len(part.stage) for part in schedule)

    def run(carry, inputs, *, local: bool):
        codes_BKT, score = carry  # [B, spans], or [B, T] for stride1
        step, number = inputs
        score = jnp.where(step.step == 0, start, score)
        if grid:
            rank_BP = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
            hidden_BT = jnp.repeat(rank_BP < step.num_hidden, span_length, axis=-1)
        else:
            hidden_BT = hide_spans(score, step.num_hidden, span_length)
        # A prompt that ends within a span is written back where its span was hidden.
        hidden_BT = hidden_BT & (np.arange(num_frames) >= num_prompt)[None]
        row_BT = jax.lax.dynamic_index_in_dim(codes_BKT, step.stage, axis=1, keepdims=False)
        # What no step has reached yet is predicted too: stride1 may leave some at the first step.
        hidden_BT = hidden_BT | (row_BT == mask_id)
        row_BT = jnp.where(hidden_BT, mask_id, row_BT)
        codes_BKT = jax.lax.dynamic_update_index_in_dim(codes_BKT, row_BT, step.stage, axis=1)

        with_text_BTV, without_BTV = network(codes_BKT, step.stage, local)
        logits_BTV = without_BTV + step.guidance * (with_text_BTV - without_BTV)
        probs_BTV = jax.nn.softmax(logits_BTV.astype(jnp.float32) / step.temperature, axis=-1)
        step_key = lambda key: jax.random.fold_in(  # noqa: E731
            jax.random.fold_in(key, step.stage), step.step
        )
        token_BT = choose_token(jax.vmap(step_key)(keys_B), probs_BTV, choice, limit)
        row_BT = jnp.where(hidden_BT, token_BT, row_BT)
        codes_BKT = jax.lax.dynamic_update_index_in_dim(codes_BKT, row_BT, step.stage, axis=1)

        prob_BT = jnp.take_along_axis(probs_BTV, token_BT[..., None], axis=-1)[..., 0]
        surprise_BT = -jnp.log(jnp.maximum(prob_BT, 1e-30))
        if not grid:
            score = jnp.where(hidden_BT, surprise_BT, KEPT)
        else:
            in_spans = (batch, num_spans, span_length)
            if span_score == "max" and span_length > 1:  # single frames are scored alike by both
                score_BP = 1 - prob_BT.reshape(in_spans).max(-1)
            else:
                score_BP = surprise_BT.reshape(in_spans).sum(-1)
            score = jnp.where(rank_BP < step.num_hidden, score_BP, KEPT)
        if on_step is not None:
            jax.debug.callback(on_step, number, total)
        return (codes_BKT, score), hidden_BT

    codes_BKT = jnp.full((batch, num_codebooks, num_frames), mask_id, jnp.int32)
    codes_BKT = codes_BKT.at[:, :, :num_prompt].set(prompt_BKP)
    numbers = np.split(np.arange(1, total + 1), [len(schedule[0].stage)])
    carry, first = jax.lax.scan(
        functools.partial(run, local=False), (codes_BKT, start), (schedule[0], numbers[0])
    )
    (codes_BKT, _), others = jax.lax.scan(
        functools.partial(run, local=True), carry, (schedule[1], numbers[1])
    )
    return Decoded(codes_BKT, jnp.concatenate([first, others]))


def guided_network(
    config: ModelConfig, params: dict, text: transformer.TextKeys
) -> Callable[[jax.Array, jax.Array, bool], tuple[jax.Array, jax.Array]]:
    """The transformer as `decode` wants it: rows with their text, and the same rows without."""

    def network(codes_BKT, stage, local):
        model = transformer.bind(config, params)
        states_BTD = model.trunk(jnp.concatenate([codes_BKT, codes_BKT]), text, local=local)
        with_text_BTV, without_BTV = jnp.split(model.head(states_BTD, stage), 2)
        return with_text_BTV, without_BTV

    return network


@functools.partial(
    jax.jit,
    static_argnames=(
        "config", "num_frames", "choice", "span_score", "span_arrangement", "dtype", "on_step",
    ),
)  # fmt: skip
def generate(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    keys_B: jax.Array,
    prompt_BKP: jax.Array,
    schedule: tuple[Schedule, Schedule],
    limit: jax.Array | float,
    *,
    config: ModelConfig,
    num_frames: int,
    choice: Choice,
    span_score: Literal["max", "prod"],
    span_arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap",
    dtype: jnp.dtype = jnp.float32,
    on_step: Callable[[int, int], None] | None = None,
) -> Decoded:
    """From text encoder states to tokens, one program a shape.

    Args:
      params: the transformer's parameters.
      states_BSE, text_mask_BS: text encoder states and which of them are tokens; a row without
        any is generated unconditionally.
      num_zero_keys_B: see `attention.cross_attention`; zeros make samples independent.
      keys_B: from `sample_keys`.
      prompt_BKP: given first frames, P may be 0.
      schedule: from `make_schedule`; traced, so its numbers may change without a new program.
      limit: see `choose_token`; traced as well.
      num_frames, choice, span_score, span_arrangement, on_step: see `decode`.
      dtype: precision of the matrix products.
    """
    text = transformer.bind(config, params).read_text(
        states_BSE, text_mask_BS, num_zero_keys_B, dtype=dtype
    )
    return decode(
        guided_network(config, params, text),
        schedule,
        keys_B,
        prompt_BKP,
        limit,
        num_frames=num_frames,
        mask_id=config.mask_id,
        span_length=config.span_length,
        choice=choice,
        span_score=span_score,
        span_arrangement=span_arrangement,
        on_step=on_step,
    )
