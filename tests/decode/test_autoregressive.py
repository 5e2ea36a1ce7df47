"""The autoregressive model by property: causality, the cache, the delay pattern, its samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from magnet_jax.config import ModelConfig
from magnet_jax.decode import autoregressive, choose
from magnet_jax.errors import UserError
from magnet_jax.model import patterns, transformer

SMALL = ModelConfig(
    kind="musicgen", num_codebooks=3, codebook_size=32, width=16, num_heads=4, num_layers=2,
    text_width=12, delays=(0, 1, 3),
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(SMALL, jax.random.key(0))


def texts(batch, length=5):
    states = jax.random.normal(jax.random.key(5), (batch, length, SMALL.text_width))
    return states, jnp.ones((batch, length), bool), jnp.zeros(batch, jnp.int32)


def codes(batch, frames):
    return jax.random.randint(jax.random.key(1), (batch, 3, frames), 0, 32)


# --- the delay pattern --------------------------------------------------------------------------


def test_steps_hold_what_the_pattern_says():
    codes_BKT = jnp.arange(1 * 3 * 4).reshape(1, 3, 4)
    np.testing.assert_array_equal(
        patterns.to_steps(codes_BKT, (0, 1, 3), 99)[0],
        [
            [99, 0, 1, 2, 3, 99, 99, 99],
            [99, 99, 4, 5, 6, 7, 99, 99],
            [99, 99, 99, 99, 8, 9, 10, 11],
        ],
    )


@pytest.mark.parametrize("delays", [(0,), (0, 1, 2, 3), (0, 0, 1, 1), (0, 5)])
def test_frames_come_back_from_steps(delays):
    codes_BKT = jax.random.randint(jax.random.key(0), (2, len(delays), 7), 0, 50)
    steps_BKS = patterns.to_steps(codes_BKT, delays, 50)
    assert steps_BKS.shape[-1] == patterns.num_steps(7, delays)
    back, valid_KT = patterns.to_frames(steps_BKS, delays, 7, first=1)
    assert valid_KT.all()
    np.testing.assert_array_equal(back, codes_BKT)


@pytest.mark.parametrize("delays", [(), (0, 1), (1, 2, 3), (0, 2, 1), (0, -1, 2)])
def test_impossible_delays_are_refused(delays):
    with pytest.raises(UserError, match="delays"):
        ModelConfig(kind="musicgen", num_codebooks=3, delays=delays)
    if delays:
        with pytest.raises(UserError, match="delays"):
            ModelConfig(delays=delays)


# --- the network --------------------------------------------------------------------------------


def test_a_prediction_depends_on_earlier_steps_alone(params):
    codes_BKT = codes(1, 10)
    run = functools.partial(tiny.teacher_forced, params, *texts(1), config=SMALL)
    before, valid_KT = run(codes_BKT=codes_BKT)
    step_KT = np.arange(10)[None] + np.asarray(SMALL.delays)[:, None]
    for k in range(3):
        t = 5
        after, _ = run(codes_BKT=codes_BKT.at[0, k, t].add(1))
        changed_KT = np.asarray((before != after).any(-1)[0]) & valid_KT
        # The code stands at step t + delay + 1, and is read from then on.
        np.testing.assert_array_equal(changed_KT, valid_KT & (step_KT > t + SMALL.delays[k]))


def test_one_step_at_a_time_gives_the_logits_of_one_pass(params):
    codes_BKT, frames = codes(2, 9), 9
    expected, valid_KT = tiny.teacher_forced(params, *texts(2), codes_BKT=codes_BKT, config=SMALL)
    steps_BKS = patterns.to_steps(codes_BKT, SMALL.delays, SMALL.mask_id, frames)

    @jax.jit
    def extend(cache, part, first):
        model = transformer.bind(SMALL, params)
        states, cache = model.extend(part, model.read_text(*texts(2)), cache, first)
        return cache, model.all_heads(states)

    cache = transformer.bind(SMALL, params).empty_cache(2, frames, jnp.float32)
    logits = []
    for first, last in ((0, 4), (4, 5), (5, 6), (6, 9)):
        cache, part = extend(cache, steps_BKS[..., first:last], first)
        logits.append(part)
    found, _ = patterns.to_frames(jnp.concatenate(logits, axis=2), SMALL.delays, frames, first=0)
    np.testing.assert_allclose(found[:, valid_KT], expected[:, valid_KT], atol=1e-5)


# --- generation ---------------------------------------------------------------------------------


def generate(params, samples, *, seed=0, choice="top_k", limit=5.0, prompt=None, guidance=3.0, **k):
    batch = len(samples)
    return tiny.one_after_another(
        params,
        *texts(1) if batch == 1 else [jnp.repeat(a, batch, axis=0) for a in texts(1)],
        choose.sample_keys(seed, jnp.asarray(samples)),
        jnp.zeros((batch, 3, 0), jnp.int32) if prompt is None else prompt,
        autoregressive.Sampling(1.0, limit, guidance),
        config=SMALL,
        num_frames=12,
        choice=choice,
        **k,
    )


def test_greedy_tokens_are_the_most_probable_of_their_own_logits(params):
    codes_BKT = generate(params, [0], choice="greedy", guidance=1.0)
    logits, valid_KT = tiny.teacher_forced(params, *texts(1), codes_BKT=codes_BKT, config=SMALL)
    np.testing.assert_array_equal(
        np.asarray(logits.argmax(-1))[:, valid_KT], np.asarray(codes_BKT)[:, valid_KT]
    )


def test_a_sample_depends_on_its_number_and_seed_alone(params):
    three = generate(params, [0, 1, 2])
    np.testing.assert_array_equal(three[1:2], generate(params, [1]))
    assert (three[0] != three[1]).any()
    assert (three != generate(params, [0, 1, 2], seed=1)).any()


def test_prompts_are_kept_and_continued(params):
    whole = generate(params, [0], choice="greedy")
    again = generate(params, [0], choice="greedy", prompt=whole[..., :5])
    np.testing.assert_array_equal(again, whole)
    given = jnp.full((1, 3, 4), 7, jnp.int32)
    assert (generate(params, [0], prompt=given)[..., :4] == 7).all()
