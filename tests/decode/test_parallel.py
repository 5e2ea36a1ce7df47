"""Decoding: the schedule's promises, the choice of spans, samples that batches leave alone.

That greedy tokens are the reference's is checked in test_golden.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from magnet_jax.config import DecodeConfig, KernelConfig, ModelConfig
from magnet_jax.decode import magnet, parallel, schedule
from magnet_jax.decode.canvas import Canvas
from magnet_jax.decode.tokens_of_text import TextStates
from magnet_jax.model import transformer


def toy_network(codebook_size):
    """Logits that depend on the position and on what is visible; no parameters."""
    table = jax.random.normal(jax.random.key(7), (4, codebook_size + 1, codebook_size))

    def trunk(codes_BKT, *, stage, local, guided, first_B):
        assert first_B is None
        logits = table[0][codes_BKT[:, 0]] + 2 * table[1][jnp.roll(codes_BKT[:, 1], 1, axis=-1)]
        logits = logits + table[2][jnp.arange(codes_BKT.shape[-1]) % codebook_size][None]
        return jnp.concatenate([logits, 0.5 * logits]) if guided else logits

    def head(states_RMD, stage, *, guided):
        logits = states_RMD + table[3, stage][None, None]
        return tuple(jnp.split(logits, 2)) if guided else (logits, None)

    return parallel.Network(trunk, head)


@functools.partial(jax.jit, static_argnames="rules")
def decode_toy(rules, task, parts):
    return parallel.decode(toy_network(16), rules, task, parts)


def run_toy(
    samples, *, seed=0, top_p=0.9, steps=(6, 3, 3, 3), prompt=0, num_frames=30, canvas=None,
    on_step=None, **settings,
):  # fmt: skip
    """Clips of four codebooks; the prompt is ones."""
    decoding = DecodeConfig(steps=steps, **settings)
    task = tiny.task(
        np.ones((len(samples), 4, num_frames), np.int32),
        num_given=prompt, samples=np.asarray(samples), seed=seed, limit=top_p,
    )  # fmt: skip
    if canvas is not None:
        task = task._replace(canvas=canvas)
    rules = tiny.rules(decoding, 3, 16, on_step=on_step)
    return decode_toy(rules, task, schedule.make_schedule(decoding))


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


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_a_sample_depends_on_its_number_and_seed_alone(arrangement):
    run = functools.partial(run_toy, span_arrangement=arrangement)
    three = run([0, 1, 2]).codes_BKT
    np.testing.assert_array_equal(three[1:2], run([1]).codes_BKT)
    np.testing.assert_array_equal(three[::-1], run([2, 1, 0]).codes_BKT)
    assert (three[0] != three[1]).any()
    assert (three != run([0, 1, 2], seed=1).codes_BKT).any()


def test_overlapping_spans_reach_every_frame_of_any_length():
    decoded = run_toy([0, 1], num_frames=31, span_arrangement="stride1")
    assert decoded.codes_BKT.shape[-1] == 31
    assert (decoded.codes_BKT < 16).all()
    starts = np.cumsum((0, 6, 3, 3))
    assert decoded.hidden_PBT[starts].all()
    assert not decoded.hidden_PBT[starts + 1].all()


def test_progress_is_reported_step_by_step():
    seen = []

    def on_step(done, total):
        seen.append((int(done), int(total)))

    run_toy([0, 1], on_step=on_step)
    jax.effects_barrier()
    assert sorted(seen) == [(i, 15) for i in range(1, 16)]


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_prompt_is_kept_to_the_frame(arrangement):
    # Three whole spans and a third of the next.
    decoded = run_toy([0], prompt=10, span_arrangement=arrangement)
    assert (decoded.codes_BKT < 16).all()
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
    network = parallel.Network(
        trunk=lambda codes_BKT, **_: jnp.broadcast_to(logits_V, (1, frames, 5)),
        head=lambda states_RMD, stage, **_: (states_RMD, None),
    )
    decoded = parallel.decode(
        network,
        tiny.rules(one_step, 1, 5, any_text=False),
        tiny.task(np.zeros((1, 1, frames), np.int32), limit=0.8),
        schedule.make_schedule(one_step),
    )
    counts = np.bincount(np.asarray(decoded.codes_BKT).ravel(), minlength=5) / frames
    np.testing.assert_allclose(counts, np.array([0.4, 0.3, 0.2, 0, 0]) / 0.9, atol=0.032)


def program_size(num_layers, steps):
    """Operations of the program for the golden model's width."""
    model = ModelConfig(codebook_size=16, width=8, num_heads=2, num_layers=num_layers, text_width=4)
    shape = jax.ShapeDtypeStruct
    decoding = DecodeConfig(steps=steps)
    generate = functools.partial(
        magnet.generate,
        config=model,
        rules=tiny.rules(decoding, 3, 16, reach=num_layers * model.local_context),
        kernels=KernelConfig(full="dense", local="blocks"),
    )
    lowered = jax.jit(generate).lower(
        jax.eval_shape(functools.partial(transformer.init_params, model), jax.random.key(0)),
        TextStates(shape((1, 3, 4), jnp.float32), shape((1, 3), bool), shape((1,), jnp.int32)),
        tiny.task(np.zeros((1, 4, 90), np.int32)),
        schedule.make_schedule(decoding),
    )
    return lowered.as_text().count("\n")


def test_the_program_does_not_grow_with_steps_or_layers():
    """Nor does the time to compile it, which goes with its size."""
    size = program_size(2, (5, 3, 3, 3))
    assert program_size(2, (60, 10, 10, 10)) == pytest.approx(size, rel=0.01)
    assert program_size(4, (5, 3, 3, 3)) == pytest.approx(size, rel=0.01)
    # Of unlike numbers of steps after the first, each has a part of the program.
    assert program_size(2, (5, 4, 3, 3)) > 1.2 * size


def test_without_a_restricted_context_nothing_is_cut():
    """Local context 0 decodes what a context as long as the clip does, whatever is saved."""
    model = ModelConfig(
        num_codebooks=2, codebook_size=16, width=16, num_heads=2, num_layers=2, text_width=4
    )
    params = transformer.init_params(model, jax.random.key(0))
    frames = 60
    decoding = DecodeConfig(steps=(3, 3), greedy=True)

    def tokens(local_context, savings, kernels, first_context=0):
        reach = model.num_layers * local_context * savings.last_window or None
        generate = functools.partial(
            magnet.generate,
            config=dataclasses.replace(
                model, local_context=local_context, first_context=first_context
            ),
            rules=tiny.rules(decoding, 3, model.mask_id, reach=reach),
            kernels=kernels,
            savings=savings,
        )
        states_BSE = 3 * jax.random.normal(jax.random.key(1), (2, 3, 4))
        return jax.jit(generate)(
            params,
            TextStates(states_BSE, np.ones((2, 3), bool), np.zeros(2, np.int32)),
            tiny.task(np.zeros((2, 2, frames), np.int32)),
            schedule.make_schedule(decoding),
        ).codes_BKT

    dense = KernelConfig(full="dense", local="dense")
    blocks = KernelConfig(full="blocks", local="blocks", local_block=22)
    expected = tokens(frames, magnet.NO_SAVINGS, dense)
    np.testing.assert_array_equal(tokens(0, magnet.NO_SAVINGS, dense), expected)
    np.testing.assert_array_equal(tokens(0, magnet.ALL_SAVINGS, blocks), expected)
    assert (tokens(1, magnet.NO_SAVINGS, dense) != expected)[:, 1].any()
    # The same of the first codebook's, which decides all tokens.
    np.testing.assert_array_equal(tokens(0, magnet.ALL_SAVINGS, blocks, frames), expected)
    near = tokens(0, magnet.NO_SAVINGS, dense, 2)
    assert (near != expected)[:, 0].any()
    np.testing.assert_array_equal(tokens(0, magnet.ALL_SAVINGS, blocks, 2), near)


# --- any canvas ---------------------------------------------------------------------------------


def random_canvas(rng, batch, num_frames):
    """Given frames, spans, codebooks and single tokens; a row of which nothing is free, too."""
    given_BKT = np.zeros((batch, 4, num_frames), bool)
    for given_KT in given_BKT:
        match rng.integers(6):
            case 0:
                given_KT[:, rng.random(num_frames) < rng.random()] = True
            case 1:
                first, last = np.sort(rng.integers(0, num_frames + 1, 2))
                given_KT[:, :first] = given_KT[:, last:] = True
            case 2:
                given_KT[: rng.integers(5)] = True
            case 3:
                given_KT[:] = rng.random((4, num_frames)) < rng.random()
            case 4:
                given_KT[:] = True
    return Canvas(rng.integers(0, 16, (batch, 4, num_frames), np.int32), given_BKT)


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_whatever_is_given_comes_out_untouched_by_one_program(arrangement):
    """Fifty random canvases, rows of unlike ones in a batch, and one compilation."""
    decode_toy.clear_cache()
    rng = np.random.default_rng(0)
    for _ in range(25):
        canvas = random_canvas(rng, 2, 30)
        decoded = run_toy([0, 1], canvas=canvas, span_arrangement=arrangement, steps=(5, 3, 2, 2))
        codes_BKT, hidden_PBT = map(np.asarray, decoded)
        kept = canvas.given_BKT
        np.testing.assert_array_equal(codes_BKT[kept], canvas.codes_BKT[kept])
        assert (codes_BKT < 16).all()
        stages = np.repeat(np.arange(4), (5, 3, 2, 2))
        predicted_BKT = np.stack([hidden_PBT[stages == k].any(0) for k in range(4)], axis=1)
        np.testing.assert_array_equal(predicted_BKT, ~kept)
    assert decode_toy._cache_size() == 1


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_a_row_does_not_depend_on_what_is_given_of_its_neighbours(arrangement):
    canvas = random_canvas(np.random.default_rng(1), 5, 30)
    run = functools.partial(run_toy, span_arrangement=arrangement)
    together = run(range(5), canvas=canvas).codes_BKT
    for i in range(5):
        alone = run([i], canvas=Canvas(*(x[i : i + 1] for x in canvas))).codes_BKT
        np.testing.assert_array_equal(alone[0], together[i])


def test_counts_are_of_the_units_that_are_free():
    """Of ten spans four are free, one of them in part: 4, 2 and 1 of them are hidden."""
    given_BKT = np.ones((1, 4, 30), bool)
    given_BKT[0, 0, [4, 6, 7, 8, 15, 16, 17, 27, 28, 29]] = False
    canvas = Canvas(np.zeros((1, 4, 30), np.int32), given_BKT)
    hidden_PBT = np.asarray(run_toy([0], canvas=canvas, steps=(3, 1, 1, 1)).hidden_PBT)
    hidden_spans = hidden_PBT.reshape(-1, 10, 3).any(-1).sum(-1)
    np.testing.assert_array_equal(hidden_spans, [4, 2, 1, 0, 0, 0])
