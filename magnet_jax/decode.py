"""From text to tokens in a fixed number of parallel steps (section 3.3, Appendix D).

Codebooks are decoded one after another. Within one, every step hides the least confident spans,
predicts them all at once, and keeps what it did not hide for good. The schedules are arrays,
computed before the loop; the loop is two scans, one for the first codebook (full attention) and one
for all others (local attention), so the network is traced twice whatever the number of steps.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax import transformer
from magnet_jax.config import DecodeConfig, ModelConfig

KEPT = -1e4  # score of a span that must not be hidden again


class Schedule(NamedTuple):
    """One entry a decoding step."""

    stage: np.ndarray  # codebook
    step: np.ndarray  # number of the step within its codebook
    num_hidden: np.ndarray  # spans hidden
    guidance: np.ndarray  # coefficient of equation 6
    temperature: np.ndarray


class Decoded(NamedTuple):
    codes_BKT: jax.Array  # token ids
    hidden_PBT: jax.Array  # True where step P of the schedule predicted


def make_schedule(config: DecodeConfig, num_spans: int) -> tuple[Schedule, Schedule]:
    """What every step does: those of the first codebook, and those of all others in turn.

    `num_spans` is the number of spans to generate a codebook, prompts left out.
    """
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
                    max(int(rate * num_spans), 1),
                    rate * config.max_guidance + (1 - rate) * config.min_guidance,
                    max(temperature, 1e-2),
                )
            )
    types = (np.int32, np.int32, np.int32, np.float32, np.float32)
    columns = [np.asarray(column, type_) for column, type_ in zip(zip(*rows), types, strict=True)]
    whole, first = Schedule(*columns), config.steps[0]
    return Schedule(*(c[:first] for c in whole)), Schedule(*(c[first:] for c in whole))


def nucleus(probs_V: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Keeps the most probable tokens until their mass exceeds `top_p`, and renormalises.

    A token stays while the mass of the more probable ones is at most `top_p`. That makes the kept
    set "all at least as probable as some threshold", and the threshold is found by bisection over
    the bits of a float, exactly and without a sort. float32 [..., V].
    """
    high = jnp.full(probs_V.shape[:-1], np.float32(1).view(np.int32))  # mass above it: at most p
    low = jnp.full_like(high, -1)  # mass above it: more than p

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)[..., None]
        enough = jnp.where(probs_V > threshold, probs_V, 0.0).sum(-1) <= top_p
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, high = jax.lax.fori_loop(0, 30, halve, (low, high))
    # Where even the whole mass is not more than p, the search ends below the bits of 0.
    threshold = jax.lax.bitcast_convert_type(jnp.maximum(high, 0), jnp.float32)[..., None]
    kept_V = jnp.where(probs_V >= threshold, probs_V, 0.0)
    return kept_V / kept_V.sum(-1, keepdims=True)


def sample_keys(seed: jax.Array | int, sample_B: jax.Array) -> jax.Array:
    """One key a sample, from (seed, number of the sample): batching changes nothing."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), sample_B)


def decode(
    network: Callable[[jax.Array, jax.Array, bool], tuple[jax.Array, jax.Array]],
    schedule: tuple[Schedule, Schedule],
    keys_B: jax.Array,
    prompt_BKP: jax.Array,
    *,
    num_frames: int,
    mask_id: int,
    span_length: int,
    top_p: jax.Array | float,
    greedy: bool,
    span_score: str,
) -> Decoded:
    """Runs the schedule.

    Args:
      network: (codes_BKT, stage, local) -> logits of that stage with and without text,
        each [B, T, V].
      schedule: from `make_schedule`.
      keys_B: one random key a sample.
      prompt_BKP: given first frames, P may be 0; kept in every codebook.
      num_frames: T, a multiple of `span_length`.
      mask_id: V.
      span_length: frames a span; spans do not overlap.
      top_p: nucleus mass; unused when greedy.
      greedy: take the most probable token.
      span_score: "max" or "prod", see `DecodeConfig`.
    """
    if num_frames % span_length:
        raise ValueError(f"{num_frames} frames are not a multiple of the span, {span_length}")
    batch, num_codebooks, num_prompt = prompt_BKP.shape
    num_spans = num_frames // span_length
    given_P = np.arange(num_spans) < num_prompt // span_length
    start_BP = jnp.broadcast_to(jnp.where(given_P, KEPT, 0.0), (batch, num_spans))

    def choose(keys_B, step, probs_BTV):
        if greedy:
            return probs_BTV.argmax(-1)
        probs_BTV = nucleus(probs_BTV, top_p)
        step_key = lambda key: jax.random.fold_in(  # noqa: E731
            jax.random.fold_in(key, step.stage), step.step
        )
        return jax.vmap(jax.random.categorical)(jax.vmap(step_key)(keys_B), jnp.log(probs_BTV))

    def run(carry, step: Schedule, *, local: bool):
        codes_BKT, score_BP = carry
        score_BP = jnp.where(step.step == 0, start_BP, score_BP)
        rank_BP = jnp.argsort(jnp.argsort(-score_BP, axis=-1), axis=-1)
        hidden_BP = rank_BP < step.num_hidden
        hidden_BT = jnp.repeat(hidden_BP, span_length, axis=-1)
        # A prompt that ends within a span is written back where its span was hidden.
        hidden_BT = hidden_BT & (np.arange(num_frames) >= num_prompt)[None]
        row_BT = jax.lax.dynamic_index_in_dim(codes_BKT, step.stage, axis=1, keepdims=False)
        row_BT = jnp.where(hidden_BT, mask_id, row_BT)
        codes_BKT = jax.lax.dynamic_update_index_in_dim(codes_BKT, row_BT, step.stage, axis=1)

        with_text_BTV, without_BTV = network(codes_BKT, step.stage, local)
        logits_BTV = without_BTV + step.guidance * (with_text_BTV - without_BTV)
        probs_BTV = jax.nn.softmax(logits_BTV.astype(jnp.float32) / step.temperature, axis=-1)
        token_BT = choose(keys_B, step, probs_BTV).astype(codes_BKT.dtype)
        row_BT = jnp.where(hidden_BT, token_BT, row_BT)
        codes_BKT = jax.lax.dynamic_update_index_in_dim(codes_BKT, row_BT, step.stage, axis=1)

        prob_BT = jnp.take_along_axis(probs_BTV, token_BT[..., None], axis=-1)[..., 0]
        prob_BPl = prob_BT.reshape(batch, num_spans, span_length)
        if span_score == "max":
            score_BP = 1 - prob_BPl.max(-1)
        else:
            score_BP = -jnp.log(jnp.maximum(prob_BPl, 1e-30)).sum(-1)
        return (codes_BKT, jnp.where(hidden_BP, score_BP, KEPT)), hidden_BT

    codes_BKT = jnp.full((batch, num_codebooks, num_frames), mask_id, jnp.int32)
    codes_BKT = codes_BKT.at[:, :, :num_prompt].set(prompt_BKP)
    carry, first = jax.lax.scan(
        functools.partial(run, local=False), (codes_BKT, start_BP), schedule[0]
    )
    (codes_BKT, _), others = jax.lax.scan(functools.partial(run, local=True), carry, schedule[1])
    return Decoded(codes_BKT, jnp.concatenate([first, others]))


def guided_network(
    config: ModelConfig, params: dict, text: transformer.TextKeys
) -> Callable[[jax.Array, jax.Array, bool], tuple[jax.Array, jax.Array]]:
    """The transformer as `decode` wants it: rows with their text, and the same rows without."""
    without = text._replace(
        mask_BS=jnp.zeros_like(text.mask_BS), num_zero_keys_B=jnp.zeros_like(text.num_zero_keys_B)
    )
    both = transformer.TextKeys(
        jnp.concatenate([text.key_LBSNH, without.key_LBSNH], axis=1),
        jnp.concatenate([text.value_LBSNH, without.value_LBSNH], axis=1),
        jnp.concatenate([text.mask_BS, without.mask_BS]),
        jnp.concatenate([text.num_zero_keys_B, without.num_zero_keys_B]),
    )

    def network(codes_BKT, stage, local):
        model = transformer.bind(config, params)
        states_BTD = model.trunk(jnp.concatenate([codes_BKT, codes_BKT]), both, local=local)
        with_text_BTV, without_BTV = jnp.split(model.head(states_BTD, stage), 2)
        return with_text_BTV, without_BTV

    return network


@functools.partial(
    jax.jit,
    static_argnames=("config", "num_frames", "greedy", "span_score", "dtype"),
)
def generate(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    num_zero_keys_B: jax.Array,
    keys_B: jax.Array,
    prompt_BKP: jax.Array,
    schedule: tuple[Schedule, Schedule],
    top_p: jax.Array | float,
    *,
    config: ModelConfig,
    num_frames: int,
    greedy: bool,
    span_score: str,
    dtype: jnp.dtype = jnp.float32,
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
      top_p: nucleus mass.
    """
    text = transformer.bind(config, params).read_text(
        states_BSE, text_mask_BS, num_zero_keys_B, dtype=dtype
    )
    return decode(
        guided_network(config, params, text),
        schedule,
        keys_B,
        prompt_BKP,
        num_frames=num_frames,
        mask_id=config.mask_id,
        span_length=config.span_length,
        top_p=top_p,
        greedy=greedy,
        span_score=span_score,
    )
