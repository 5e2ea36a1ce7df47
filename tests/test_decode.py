"""Decoding: the reference's tokens, the schedule's promises, samples that batches leave alone."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax import convert, decode
from magnet_jax.config import DecodeConfig

CASES = (
    "default", "prod", "constant_temperature", "guidance_20_to_1", "guidance_3_to_3",
    "few_steps", "prompt", "unconditional", "span_len_1", "span_len_5",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(golden):
    return convert.read_audiocraft(golden / "magnet_tiny")[:2]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_the_references(golden, tiny, name):
    config, params = tiny
    case = json.loads((golden / "magnet_tiny" / "generate.json").read_text())[name]
    text = np.load(golden / "magnet_tiny" / "forward.npz")
    reference = np.load(golden / "magnet_tiny" / "generate.npz")
    span = case["span_len"]
    num_frames = 100 // span * span
    decoding = DecodeConfig(
        steps=tuple(case["decoding_steps"]),
        temperature=case["temp"],
        anneal_temperature=case["anneal_temp"],
        max_guidance=case["max_cfg_coef"],
        min_guidance=case["min_cfg_coef"],
    )
    width = text["t5_hidden"].shape[1]
    lengths_B = text["text_lengths"] * case["text"]
    decoded = decode.generate(
        params,
        text["t5_hidden"],
        np.arange(width) < lengths_B[:, None],
        width - lengths_B,
        decode.sample_keys(0, jnp.arange(2)),
        reference["prompt_codes"][:, :, : case["prompt_frames"]].astype(np.int32),
        decode.make_schedule(decoding, num_frames // span - case["prompt_frames"] // span),
        1.0,
        config=dataclasses.replace(config, span_length=span),
        num_frames=num_frames,
        greedy=True,
        span_score=case["span_scoring"],
    )
    np.testing.assert_array_equal(decoded.codes_BKT, reference[name])


@pytest.mark.parametrize("mass", ["0.5", "0.8", "0.9", "0.99"])
def test_nucleus_is_the_references(golden, mass):
    reference = np.load(golden / "top_p.npz")
    probs = decode.nucleus(jax.nn.softmax(reference["logits"]), float(mass))
    np.testing.assert_allclose(probs, reference[f"probs_p{mass}"], atol=1e-6)
    np.testing.assert_array_equal(probs > 0, reference[f"probs_p{mass}"] > 0)


def test_a_nucleus_of_everything_keeps_everything():
    logits = 20 * jax.random.normal(jax.random.key(0), (50, 300))
    probs = jnp.concatenate([jax.nn.softmax(logits), jax.nn.one_hot(jnp.arange(3), 300)])
    np.testing.assert_allclose(decode.nucleus(probs, 1.0), probs, rtol=1e-5, atol=1e-7)


def test_schedule_follows_equation_6_and_anneals():
    config = DecodeConfig(steps=(5, 1, 2), temperature=3.0, max_guidance=10, min_guidance=1)
    first, others = decode.make_schedule(config, 40)
    rates = np.cos(np.pi / 2 * np.arange(5) / 4)
    np.testing.assert_array_equal(first.num_hidden, [40, 36, 28, 15, 1])
    np.testing.assert_allclose(first.guidance, rates * 10 + (1 - rates), rtol=1e-6)
    np.testing.assert_allclose(first.temperature, [2.4, 1.8, 1.2, 0.6, 0.01], rtol=1e-6)
    np.testing.assert_array_equal(others.stage, [1, 2, 2])
    np.testing.assert_array_equal(others.step, [0, 0, 1])
    np.testing.assert_array_equal(others.num_hidden, [40, 40, 1])


def toy_network(codebook_size):
    """Logits that depend on the position and on what is visible; no parameters."""
    table = jax.random.normal(jax.random.key(7), (4, codebook_size + 1, codebook_size))

    def network(codes_BKT, stage, local):
        logits = table[0][codes_BKT[:, 0]] + 2 * table[1][jnp.roll(codes_BKT[:, 1], 1, axis=-1)]
        logits = logits + table[2][(jnp.arange(codes_BKT.shape[-1]) + stage) % codebook_size][None]
        return logits, 0.5 * logits

    return network


@functools.partial(jax.jit, static_argnames="num_frames")
def decode_toy(schedule, keys_B, prompt_BKP, top_p, num_frames):
    return decode.decode(
        toy_network(16),
        schedule,
        keys_B,
        prompt_BKP,
        num_frames=num_frames,
        mask_id=16,
        span_length=3,
        top_p=top_p,
        greedy=False,
        span_score="max",
    )


def run_toy(samples, *, seed=0, top_p=0.9, steps=(6, 3, 3, 3), prompt=0):
    return decode_toy(
        decode.make_schedule(DecodeConfig(steps=steps), 10 - prompt // 3),
        decode.sample_keys(seed, jnp.asarray(samples)),
        jnp.ones((len(samples), 4, prompt), jnp.int32),
        top_p,
        num_frames=30,
    )


def test_every_span_is_kept_exactly_once_and_never_hidden_again():
    counts = (6, 3, 1, 3)
    decoded = run_toy([0, 1], steps=counts)
    assert (decoded.codes_BKT < 16).all() and (decoded.codes_BKT >= 0).all()
    start = 0
    for steps in counts:
        hidden_PBT = np.asarray(decoded.hidden_PBT[start : start + steps])
        assert hidden_PBT[0].all()
        assert not (hidden_PBT[1:] & ~hidden_PBT[:-1]).any()
        spans = hidden_PBT.reshape(*hidden_PBT.shape[:2], -1, 3)
        assert (spans.all(-1) == spans.any(-1)).all()
        start += steps


def test_a_sample_depends_on_its_number_and_seed_alone():
    three = run_toy([0, 1, 2]).codes_BKT
    np.testing.assert_array_equal(three[1:2], run_toy([1]).codes_BKT)
    np.testing.assert_array_equal(three[::-1], run_toy([2, 1, 0]).codes_BKT)
    assert (three[0] != three[1]).any()
    assert (three != run_toy([0, 1, 2], seed=1).codes_BKT).any()


def test_prompt_is_kept_to_the_frame():
    decoded = run_toy([0], prompt=10)  # three whole spans and a third of the next
    assert (decoded.codes_BKT[:, :, :10] == 1).all()
    assert not decoded.hidden_PBT[:, :, :10].any()


def test_a_tiny_nucleus_is_greedy():
    one, other = (run_toy([0], seed=s, top_p=1e-6, steps=(1, 1, 1, 1)) for s in (0, 1))
    np.testing.assert_array_equal(one.codes_BKT, other.codes_BKT)


def test_sampled_tokens_follow_the_nucleus():
    """4000 draws of one distribution; expected frequencies within four standard errors."""
    logits_V = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.06, 0.04]))
    frames = 4000
    one_step = DecodeConfig(steps=(1,), temperature=1.0, anneal_temperature=False)
    decoded = decode.decode(
        lambda codes_BKT, stage, local: (jnp.broadcast_to(logits_V, (1, frames, 5)),) * 2,
        decode.make_schedule(one_step, frames),
        decode.sample_keys(0, jnp.arange(1)),
        jnp.zeros((1, 1, 0), jnp.int32),
        num_frames=frames, mask_id=5, span_length=1, top_p=0.8, greedy=False, span_score="max",
    )  # fmt: skip
    counts = np.bincount(np.asarray(decoded.codes_BKT).ravel(), minlength=5) / frames
    np.testing.assert_allclose(counts, np.array([0.4, 0.3, 0.2, 0, 0]) / 0.9, atol=0.032)


def test_one_program_a_shape(tiny):
    config, params = tiny
    decode.generate.clear_cache()
    for batch, coefficient, seed in ((1, 10.0, 0), (1, 3.0, 1), (2, 3.0, 1), (2, 5.0, 2)):
        decode.generate(
            params,
            jnp.zeros((batch, 5, config.text_width)),
            jnp.ones((batch, 5), bool),
            jnp.zeros(batch, jnp.int32),
            decode.sample_keys(seed, jnp.arange(batch)),
            jnp.zeros((batch, 4, 0), jnp.int32),
            decode.make_schedule(DecodeConfig(steps=(2, 1, 1, 1), max_guidance=coefficient), 4),
            0.8 + 0.01 * seed,
            config=config,
            num_frames=12,
            greedy=False,
            span_score="max",
        )
    assert decode.generate._cache_size() == 2
