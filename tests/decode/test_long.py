"""Clips that are longer than the window: the length, what they begin with, and what they share."""

import dataclasses

import numpy as np
import pytest
import tiny

from magnet_jax import MAGNeT, programs
from magnet_jax.codec import decoding, encodec
from magnet_jax.config import LongConfig, SamplingMeshConfig
from magnet_jax.decode import canvas, joint, long, sampling
from magnet_jax.decode.placement import Execution
from magnet_jax.decode.tokens_of_text import tokenize_texts
from magnet_jax.errors import UserError

TEXTS = ["a waltz", "a march"]
WINDOW = 100  # frames that the model hears at once


@pytest.fixture(scope="module")
def loaded():
    return tiny.loaded_model(steps=(2, 1, 1, 1))


def batch_of(loaded, num_frames, texts=TEXTS, prompt_BKP=None, **asked):
    given = None if prompt_BKP is None else canvas.beginning_with(prompt_BKP, num_frames)
    asked = {"decoding": loaded.config.sampling, "seed": 3, "given": given} | asked
    return sampling.make_batch(loaded, texts, num_frames=num_frames, **asked)


def made(loaded, num_frames, how=LongConfig(), stride=None, execution=Execution(), **asked):  # noqa: B008
    """All parts of clips, checked on the way: what is made stays as it is."""
    parts = []
    for part in long.windows(loaded, batch_of(loaded, num_frames, **asked), how, stride, execution):
        part = part._replace(codes_BKT=part.codes_BKT.copy(), made_BT=part.made_BT.copy())
        if parts:
            before_BT = parts[-1].made_BT
            assert (part.made_BT >= before_BT).all()
            np.testing.assert_array_equal(
                part.codes_BKT.swapaxes(1, 2)[before_BT],
                parts[-1].codes_BKT.swapaxes(1, 2)[before_BT],
            )
        parts.append(part)
    assert [part.done for part in parts] == list(range(parts[0].total + 1))
    codes_BKT = parts[-1].codes_BKT
    assert codes_BKT.shape == (len(asked.get("texts", TEXTS)), 4, num_frames)
    assert parts[-1].made_BT.all() and codes_BKT.min() >= 0 and codes_BKT.max() < 1024
    return codes_BKT


@pytest.fixture(scope="module")
def clip(loaded):
    """Clips of one window."""
    return sampling.run(loaded, batch_of(loaded, WINDOW), Execution()).codes_BKT


def test_a_longer_clip_begins_with_the_shorter_one(loaded, clip):
    """Of any length; and all of them with the clip of one window."""
    programs.forget()
    longest = made(loaded, 331)
    for num_frames in (101, 250):
        shorter = made(loaded, num_frames)
        np.testing.assert_array_equal(shorter, longest[..., :num_frames])
    assert programs.count() == 2  # of the first window, and of those that go on
    np.testing.assert_array_equal(longest[..., :WINDOW], clip)
    # No window draws the random numbers of another one.
    assert (longest[..., WINDOW : 2 * WINDOW] != clip).any((1, 2)).all()


def test_anchors_that_share_nothing_are_windows_by_themselves(loaded, clip):
    """Filling leaves them as they are, and so does it how many are made at once."""
    how = LongConfig(mode="anchors", lead=0)
    found = made(loaded, 300, how)  # windows at 0, 141 and 282
    batch = batch_of(loaded, WINDOW)
    alone = dataclasses.replace(batch, origin_B=np.full(2, 141, np.int32))
    alone_BKT = sampling.run(loaded, alone, Execution()).codes_BKT
    np.testing.assert_array_equal(found[..., :WINDOW], clip)
    np.testing.assert_array_equal(found[..., 141 : 141 + WINDOW], alone_BKT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long, "ROWS", 2)
        np.testing.assert_array_equal(made(loaded, 300, how), found)
    np.testing.assert_array_equal(made(loaded, 200, how), found[..., :200])


def test_sliding_windows_that_hear_nothing_are_windows_by_themselves(loaded, clip):
    found = made(loaded, 250, stride=2.0)
    alone = dataclasses.replace(batch_of(loaded, WINDOW), origin_B=np.full(2, 100, np.int32))
    np.testing.assert_array_equal(found[..., :WINDOW], clip)
    np.testing.assert_array_equal(
        found[..., 100:200], sampling.run(loaded, alone, Execution()).codes_BKT
    )


def test_a_window_hears_what_is_there(loaded):
    """Sliding windows are continuations of what they begin with, with the law of edits."""
    found = made(loaded, 190, stride=1.2)
    assert found.shape[-1] == 190
    first, known = 60, 100
    given = canvas.beginning_with(found[..., first:known], WINDOW)
    law = long.plan(LongConfig(), long.Shape(size=WINDOW, stride=60, lead=0, gap=0), 0, 190)[1]
    assert law.windows == [long.Window(first, known, 160)]
    batch = dataclasses.replace(
        batch_of(loaded, WINDOW), canvas=given, editing=law.editing,
        origin_B=np.full(2, first, np.int32),
    )  # fmt: skip
    again = sampling.run(loaded, batch, Execution()).codes_BKT
    np.testing.assert_array_equal(again, found[..., first : first + WINDOW])


def test_one_joint_window_is_a_clip(loaded, clip):
    """Several have the length that they should, and the same tokens on a mesh."""
    one = dataclasses.replace(
        batch_of(loaded, 102), windows=joint.Windows(size=102, stride=48, count=1)
    )
    joined = sampling.run(loaded, one, Execution()).codes_BKT
    np.testing.assert_array_equal(joined[..., :WINDOW], clip)
    how, prompt_BKP = LongConfig(mode="joint"), np.full((2, 4, 30), 7)
    found = made(loaded, 190, how, prompt_BKP=prompt_BKP)
    np.testing.assert_array_equal(found[..., :30], prompt_BKP)
    mesh = Execution(mesh=SamplingMeshConfig(data=2, guidance=2))
    again = made(loaded, 190, how, prompt_BKP=prompt_BKP, execution=mesh)
    np.testing.assert_array_equal(again, found)


def test_weights_of_joint_windows():
    for size, stride, count in ((102, 48, 5), (100, 99, 3), (10, 3, 4), (10, 3, 1), (9, 1, 2)):
        windows = joint.Windows(size=size, stride=stride, count=count)
        heard_NT = np.zeros((count, windows.num_frames))
        for number_T, place_T, weight_T in windows.over():
            frame_T = np.arange(windows.num_frames)
            right_T = number_T * stride + place_T == frame_T
            assert right_T[weight_T > 0].all()
            np.add.at(heard_NT, (number_T, frame_T), weight_T)
        np.testing.assert_allclose(heard_NT.sum(0), 1)
        inside_NT = [
            (frame_T - n * stride >= 0) & (frame_T - n * stride < size) for n in range(count)
        ]
        np.testing.assert_array_equal(heard_NT > 0, inside_NT)


def test_what_comes_after_a_prompt_of_any_length(loaded):
    """It may be longer than a window; and the model may be a hybrid."""
    prompt_BKP = np.random.default_rng(0).integers(0, 1024, (2, 4, 170))
    for mode, prompt, num_frames in (("sliding", 30, 150), ("anchors", 170, 320)):
        how = LongConfig(mode=mode)
        found = made(loaded, num_frames, how, prompt_BKP=prompt_BKP[..., :prompt])
        np.testing.assert_array_equal(found[..., :prompt], prompt_BKP[..., :prompt])
    hybrid = tiny.loaded_model("hybrid", steps=(2, 1, 1, 1))
    begun = sampling.run(hybrid, batch_of(hybrid, WINDOW), Execution()).codes_BKT
    np.testing.assert_array_equal(made(hybrid, 130)[..., :WINDOW], begun)


def test_plans_cover_clips():
    """Every frame is made once, within what its window hears, after what is beside it."""
    for mode, lead in (("sliding", 0), ("anchors", 0), ("anchors", 30), ("anchors", 66)):
        gap = lead // 3
        shape = long.Shape(size=100, stride=60 if mode == "sliding" else 140 - lead - gap,
                           lead=lead, gap=gap)  # fmt: skip
        for known, num_frames in ((0, 101), (0, 999), (20, 340), (130, 500), (450, 500)):
            rounds = long.plan(LongConfig(mode=mode), shape, known, num_frames)
            times_T = np.zeros(2000, int)
            times_T[:known] += 1
            for round_ in rounds:
                for window in round_.windows:
                    assert window.first <= window.begin < window.end <= window.first + 100
                    assert window.begin >= window.first + (lead + gap) * (round_.lead > 0)
                    times_T[window.begin : window.end] += 1
            assert (times_T[:num_frames] == 1).all() and times_T.max() == 1
            assert len(rounds) <= 3 or mode == "sliding"
            # Few shapes: calls have as many rows, and every row is in one of them.
            for round_ in rounds:
                calls = long._calls(round_, 7)
                assert len({len(rows) for rows in calls}) == 1 and len(calls[0]) <= long.ROWS
                found = {(clip, window.first) for rows in calls for clip, window in rows}
                assert len(found) == 7 * len(round_.windows)


def test_what_does_not_go_together(loaded):
    hybrid = tiny.loaded_model("hybrid")
    anchors, joined = LongConfig(mode="anchors"), LongConfig(mode="joint")
    for call, message in (
        (lambda: made(hybrid, 150, joined), "joint windows are for a MAGNeT"),
        (lambda: made(loaded, 150, stride=2.1), "extend_stride must lie between 0 and 2 seconds"),
        (lambda: made(loaded, 150, anchors, 1.0), "must lie between 1.2 and 3.2 seconds"),
        (
            lambda: made(loaded, 150, joined,
                         execution=Execution(mesh=SamplingMeshConfig(frames=2))),
            "cannot be split by frames",
        ),
        (lambda: long.stride_of_clip(loaded, 100, 1.0, "--x", joined), "--x is for clips of more"),
        (lambda: LongConfig(lead=0.8), "long.lead must lie between 0 and 0.7"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call()
    assert long.window_stride(loaded, None, "x") == 1.2
    assert long.window_stride(loaded, None, "x", joined) == 1.0
    assert long.window_stride(loaded, None, "x", anchors) == 2.0
    assert long.stride_of_clip(loaded, 100, None, "x", joined) is None


def test_texts_of_windows(loaded):
    text = tokenize_texts(loaded, ["a waltz", ""])
    found = long.texts_of_windows(text, np.array([0, 0, 1]), np.array([0, 60, 0]))
    np.testing.assert_array_equal(found.ids_BS[:2], text.ids_BS[[0, 0]])
    assert found.mask_BS.any(-1).tolist() == [True, True, False]


def test_from_python(loaded, clip):
    """Progress counts all windows, and what is heard is the whole of the tokens, without a seam."""
    decoder = encodec.load_decoder("embedded")
    model, seen = MAGNeT(loaded, decoder), []
    model.set_generation_params(decoding_steps=(2, 1, 1, 1), duration=3.0)
    model.set_custom_progress_callback(lambda *step: seen.append(step))
    wav_BCN, tokens_BKT = model.generate(TEXTS, True, return_tokens=True, seed=3)
    assert wav_BCN.shape == (2, 1, 48_000) and tokens_BKT.shape == (2, 4, 150)
    np.testing.assert_array_equal(tokens_BKT[..., :WINDOW], clip)
    assert sorted(seen) == [(step, 10) for step in range(1, 11)]
    np.testing.assert_array_equal(wav_BCN, decoding.decode_audio(decoder, tokens_BKT))
    model.set_custom_progress_callback(None)
    _, again_BKT = model.generate_continuation(
        wav_BCN[..., :16_000], model.sample_rate, TEXTS, True, True, seed=3
    )
    assert again_BKT.shape == tokens_BKT.shape
    np.testing.assert_array_equal(
        again_BKT[0, :, :50], model._encode(wav_BCN[0, :, :16_000], 16_000)
    )
    with pytest.raises(UserError, match="drafts are of clips up to 2 seconds"):
        model.draft("a waltz")
    model.set_long_params("anchors", 2.5, lead=0.0, anneal="rate", steps="auto")
    assert model.longer == LongConfig(mode="anchors", lead=0.0, anneal="rate", steps="auto")
    with pytest.raises(UserError, match="extend_stride must lie between 2 and 4 seconds"):
        model.set_long_params("anchors", 1.5, lead=0.0)
    model.set_long_params("joint")
    _, plain_BKT = model.generate(TEXTS, return_tokens=True, seed=3)
    # A row of a blend makes all rows have shares, of each window's frames.
    blend = [("a waltz", 0.5), ("a jig", 0.5)]
    _, mixed_BKT = model.generate([TEXTS[0], blend], return_tokens=True, seed=3)
    np.testing.assert_array_equal(mixed_BKT[0], plain_BKT[0])
    assert (mixed_BKT[1] != plain_BKT[1]).any()
