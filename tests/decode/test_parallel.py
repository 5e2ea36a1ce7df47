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


LAW_OF_EDITS = {"given_have_say": False, "above_hidden": True}


def run_toy(
    samples, *, seed=0, top_p=0.9, steps=(6, 3, 3, 3), prompt=0, num_frames=30, canvas=None,
    on_step=None, law=None, min_guidance=None, **settings,
):  # fmt: skip
    """Clips of four codebooks; the prompt is ones. `law` has fields of `Rules`."""
    decoding = DecodeConfig(steps=steps, **settings)
    task = tiny.task(
        np.ones((len(samples), 4, num_frames), np.int32),
        num_given=prompt, samples=np.asarray(samples), seed=seed, limit=top_p,
    )  # fmt: skip
    if canvas is not None:
        task = task._replace(canvas=canvas)
    if min_guidance is not None:
        task = task._replace(min_guidance=np.float32(min_guidance))
    rules = tiny.rules(decoding, 3, 16, on_step=on_step, **law or {})
    return decode_toy(rules, task, schedule.make_schedule(decoding, rules.first_codebook))


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


# --- edits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_edits_keep_what_is_given_and_decode_the_rest_from_the_first_step_on(arrangement):
    """Fifty random canvases under the law of edits, and one compilation."""
    decode_toy.clear_cache()
    rng, counts = np.random.default_rng(2), (5, 3, 2, 2)
    run = functools.partial(
        run_toy, [0, 1], span_arrangement=arrangement, steps=counts, law=LAW_OF_EDITS,
        min_guidance=1.0,
    )  # fmt: skip
    for _ in range(25):
        canvas = random_canvas(rng, 2, 30)
        codes_BKT, hidden_PBT = map(np.asarray, run(canvas=canvas))
        kept = canvas.given_BKT
        np.testing.assert_array_equal(codes_BKT[kept], canvas.codes_BKT[kept])
        assert (codes_BKT < 16).all()
        assert not (hidden_PBT & np.repeat(kept.swapaxes(0, 1), counts, axis=0)).any()
        for k, end in enumerate(np.cumsum(counts)):
            free_BT, steps_SBT = ~kept[:, k], hidden_PBT[end - counts[k] : end]
            if arrangement == "stride1":  # there, the first step may leave some to the second
                np.testing.assert_array_equal(steps_SBT.any(0), free_BT)
                continue
            np.testing.assert_array_equal(steps_SBT[0], free_BT)
            assert not (steps_SBT[1:] & ~steps_SBT[:-1]).any()
            spans_SBU = steps_SBT.reshape(counts[k], 2, -1, 3).any(-1)
            np.testing.assert_array_equal(spans_SBU[-1].sum(-1), free_BT.any(-1))
    assert decode_toy._cache_size() == 1


def telltale_network():
    """Token 0 where all codebooks above the one that is predicted are hidden, 1 elsewhere."""

    def trunk(codes_BKT, *, stage, local, guided, first_B):
        above_K = jnp.arange(codes_BKT.shape[1]) > stage
        seen_BT = (above_K[None, :, None] & (codes_BKT != 16)).any(1)
        return 50.0 * jax.nn.one_hot(seen_BT.astype(jnp.int32), 16)

    return parallel.Network(trunk, lambda states_RMD, stage, *, guided: (states_RMD, None))


@pytest.mark.parametrize("hidden", [True, False])
def test_codebooks_above_are_hidden_while_one_is_predicted(hidden):
    decoding = DecodeConfig(steps=(3, 2, 2, 2), greedy=True)
    given_BKT = np.ones((1, 4, 30), bool)
    given_BKT[..., 12:21] = False
    task = tiny.task(np.full((1, 4, 30), 5, np.int32))
    task = task._replace(canvas=task.canvas._replace(given_BKT=given_BKT))
    # What is predicted depends on the frame itself, so what is free is a codebook here.
    given_BKT[:, 3] = True
    rules = tiny.rules(decoding, 3, 16, any_text=False, above_hidden=hidden)
    codes_BKT = parallel.decode(
        telltale_network(), rules, task, schedule.make_schedule(decoding)
    ).codes_BKT
    assert (codes_BKT[:, :3, 12:21] == (0 if hidden else 1)).all()
    assert (codes_BKT[:, 3] == 5).all() and (codes_BKT[..., :12] == 5).all()


def test_guidance_and_temperature_go_by_what_is_hidden():
    [rows] = schedule.make_schedule(DecodeConfig(steps=(5,)))
    free_B = np.array([100, 20, 0])
    state = parallel.State(None, None, free_B[:, None], 100)
    task = tiny.task(np.zeros((3, 1, 3), np.int32))._replace(min_guidance=np.float32(1))
    for step in range(5):
        of_clip = type(rows)(*(x[0, step] for x in rows))
        guidance_B, temperature_B = (
            np.asarray(x)[:, 0, 0] for x in parallel.annealed(task, state, of_clip)[3:5]
        )
        # Where all is free it is the schedule, to the bit.
        assert guidance_B[0] == of_clip.guidance and temperature_B[0] == of_clip.temperature
        share = np.cos(np.pi / 2 * step / 4) * np.array([0.2, 0])
        np.testing.assert_allclose(guidance_B[1:], 1 + 9 * share, rtol=1e-5)
        # The time that a whole clip has left when it hides as much, of a step that it is at.
        left = (1 - np.arccos(share) * 2 / np.pi) / max(1 - step / 4, 1e-6)
        expected = np.maximum(of_clip.temperature * left, 0.01)
        np.testing.assert_allclose(temperature_B[1:], expected, rtol=1e-3)
    assert parallel.annealed(task._replace(min_guidance=None), state, rows) is rows


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_a_blank_canvas_is_decoded_as_ever_whatever_edits_do(arrangement):
    run = functools.partial(run_toy, [0, 1], span_arrangement=arrangement)
    found = run(law=LAW_OF_EDITS, min_guidance=DecodeConfig().min_guidance)
    for one, other in zip(found, run()):
        np.testing.assert_array_equal(one, other)


WINDOWED = ModelConfig(
    num_codebooks=3, codebook_size=16, width=16, num_heads=2, num_layers=2, text_width=4,
    local_context=2,
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("rules", "kernels"))
def decode_windowed(params, task, parts, *, rules, kernels):
    batch = len(task.keys_B)
    text = TextStates(jnp.ones((batch, 3, 4)), np.ones((batch, 3), bool), np.zeros(batch, np.int32))
    return magnet.generate(
        params, text, task, parts, config=WINDOWED, rules=rules, kernels=kernels
    ).codes_BKT


@pytest.mark.parametrize(("local", "length"), [("blocks", None), ("dense", 54)])
def test_a_region_is_decoded_from_what_it_can_see(local, length):
    """To the token as from the whole clip; and a frame less on each side is too few."""
    params = tiny.random_params(WINDOWED)
    decoding, frames, reach, size = DecodeConfig(steps=(3, 3, 3), greedy=True), 60, 4, 12
    end = length or frames
    first_B = np.r_[np.arange(0, end - size, 2), end - size].astype(np.int32)
    shape = (len(first_B), 3, frames)
    codes_BKT = np.random.default_rng(0).integers(0, 16, shape).astype(np.int32)
    given_BKT = np.ones(shape, bool)
    for given_KT, first in zip(given_BKT, first_B):
        given_KT[:, first : first + size] = False

    def tokens(reach, extent):
        task = tiny.task(codes_BKT, length=length and np.int32(length))._replace(
            canvas=Canvas(codes_BKT, given_BKT), min_guidance=np.float32(1), first_B=first_B
        )
        rules = tiny.rules(decoding, 3, 16, reach=reach, extent=extent, **LAW_OF_EDITS)
        kernels = KernelConfig(full="dense", local=local, local_block=22)
        made_BKT = decode_windowed(
            params, task, schedule.make_schedule(decoding), rules=rules, kernels=kernels
        )
        return np.asarray(made_BKT)[..., :end]

    expected_BKT = tokens(None, None)
    np.testing.assert_array_equal(tokens(reach, size), expected_BKT)
    assert (tokens(reach - 1, size) != expected_BKT).any()


def test_any_order_decides_without_the_tokens():
    def hidden(order, seed=0, samples=(0, 1)):
        law = LAW_OF_EDITS | {"order": order}
        return np.asarray(run_toy(list(samples), seed=seed, law=law).hidden_PBT)

    np.testing.assert_array_equal(hidden("halton"), hidden("halton", seed=1))
    # Of ten spans, these stay hidden longest: the last of van der Corput's sequence.
    left_U = hidden("halton")[:6].reshape(6, 2, 10, 3).any(-1)[4, 0]
    np.testing.assert_array_equal(np.flatnonzero(left_U), [3, 5, 7])
    one, other = hidden("random"), hidden("random", seed=1)
    assert (one != other).any() and (one[:, 0] != one[:, 1]).any()
    np.testing.assert_array_equal(one[:, 1:], hidden("random", samples=[1]))
    assert (one != hidden("confidence")).any()


def test_a_given_codebook_needs_no_steps():
    """It has its number and the others their random numbers, whether its steps are run or not."""
    given_BKT = np.zeros((2, 4, 30), bool)
    given_BKT[:, 0] = True
    codes_BKT = np.random.default_rng(0).integers(0, 16, given_BKT.shape).astype(np.int32)
    run = functools.partial(run_toy, [0, 1], canvas=Canvas(codes_BKT, given_BKT))
    found, expected = run(law={"first_codebook": 1}), run()
    np.testing.assert_array_equal(found.codes_BKT, expected.codes_BKT)
    np.testing.assert_array_equal(found.hidden_PBT, expected.hidden_PBT[6:])
    assert not expected.hidden_PBT[:6].any()


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_replaying_a_clip_under_its_own_text_says_the_same(arrangement):
    codes_BKT = np.random.default_rng(0).integers(0, 16, (2, 4, 30)).astype(np.int32)

    def replayed(fresh):
        decoding = DecodeConfig(steps=(6, 3, 3, 3), span_arrangement=arrangement)
        task = tiny.task(np.tile(codes_BKT, (2, 1, 1)), samples=np.array([0, 1, 0, 1]))
        task = task._replace(replayed_BKT=task.canvas.codes_BKT, limit=np.float32(fresh))
        rules = tiny.rules(decoding, 3, 16, order="halton", **LAW_OF_EDITS)
        return np.asarray(decode_toy(rules, task, schedule.make_schedule(decoding)).codes_BKT)

    same_BKT = replayed(0.0)
    np.testing.assert_array_equal(same_BKT[2:], codes_BKT)
    np.testing.assert_array_equal(same_BKT[:2], codes_BKT)
    # With chance anew, tokens agree about as often as two clips do.
    anew_BKT = replayed(1.0)
    np.testing.assert_array_equal(anew_BKT[:2], codes_BKT)
    assert (anew_BKT[2:] != codes_BKT).mean() > 0.7
    assert 0.1 < (replayed(0.3)[2:] != codes_BKT).mean() < (anew_BKT[2:] != codes_BKT).mean()
