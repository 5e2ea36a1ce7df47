"""What users may give for a text, what it comes to frame by frame, and parts of it."""

import dataclasses
import json

import numpy as np
import pytest

from magnet_jax import Prompt, prompts
from magnet_jax.errors import UserError

RATE = 50.0
WORDS = ("a", "b", "c")


def shares(description, num_frames, texts=WORDS, negative=False):
    """[T, G], frame by frame."""
    found = description.negatives if negative else description.sections
    knot_P, weight_PG = prompts.shares(
        found, texts, fade=description.fade, start=description.start, frame_rate=RATE
    )
    frames = np.arange(num_frames)
    return np.stack([np.interp(frames, knot_P, weight_P) for weight_P in weight_PG.T], 1)


def test_descriptions_of_every_kind():
    blend = [("a", 0.7), ("b", 0.3)]
    timeline = [(0, "a"), (8, blend), (9.5, "")]
    read = prompts.as_descriptions
    assert read("a", "x") == read(["a"], "x") == ["a"]
    assert read(None, "x") is None and read([None, "b"], "x") == ["", "b"]
    assert read(blend, "x") == read([blend], "x") == [Prompt(blend)]
    assert read(timeline, "x") == [Prompt(timeline)]
    prompt = Prompt("a", negative=blend, fade=2)
    assert read([blend, "b", prompt, timeline], "x")[1:3] == ["b", prompt]
    assert read(prompt, "x") == [prompt]
    for one in ("a", prompt, Prompt(timeline), Prompt(None, negative="b", start=-2)):
        assert prompts.from_json(json.loads(json.dumps(prompts.as_json(one)))) == one
    assert prompts.all_texts(prompt) == ["a", "b"]


def test_what_is_one_text_is_that_text():
    for value in (
        "a", [("a", 1), ("b", 0)], [("a", 0.2), ("a", 0.6)], [(0, "a"), (8, "a")], [(0, [("a", 3)])]
    ):  # fmt: skip
        for negative in ("", [("", 1)], [(0, ""), (3, "")]):
            assert prompts.simplified(Prompt(value, negative=negative)) == "a"
    assert prompts.simplified(Prompt(None)) == ""
    for value in (
        Prompt([("a", 1), ("b", 1)]),
        Prompt("a", negative="b"),
        Prompt([(0, "a"), (1, "")]),
    ):
        assert prompts.simplified(value) is value


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([("a", -0.5), ("b", 1)], "weights of x must not be below 0.*'a'"),
        ([("a", float("nan"))], "weights of x must be numbers, not nan"),
        ([("a", float("inf")), ("b", 1)], "weights of x must be numbers"),
        ([("a", 0), ("b", 0.0)], "weights of x must have a sum above 0"),
        ([(1, "a"), (2, "b")], "times of x must begin at 0 and rise.*1, 2"),
        ([(0, "a"), (3, "b"), (2, "c")], "times of x must begin at 0 and rise.*0, 3, 2"),
        ([(0, "a"), (2, "b"), (2, "c")], "times of x must begin at 0 and rise"),
        ([(0, "a"), (float("nan"), "b")], "times of x must be numbers"),
        ([(0, "a"), (1, [(2, "b")])], "x must be a text, a list"),
        ([(0, "a"), (1, None)], "x must be a text, a list"),
        ([("a", True)], "x must be a text|weights of x must be numbers"),
        ([[("a", 0.5), ("b", "c")]], "weights of x must be numbers, not 'c'"),
        ([("a", 0.5), "b"], "x must be a text, a list"),
        ([3], "x must be a text, a list"),
        ([[(f"text {i}", 1) for i in range(65)]], "x has 65 texts, and a clip takes 64"),
        ([[("\ud800", 1), ("b", 1)]], "not valid Unicode"),
        ({"a": 1}, "x must be a text or a list"),
        ([], "x are empty"),
    ],
)  # fmt: skip
def test_what_is_no_description_is_one_line(value, named):
    with pytest.raises(UserError, match=named) as error:
        prompts.as_descriptions(value, "x")
    assert "\n" not in str(error.value)


def test_a_prompt_says_which_of_its_fields_is_wrong():
    for name, value in (("negative", [("a", -1)]), ("fade", -1), ("fade", 61), ("start", np.nan)):
        with pytest.raises(UserError, match=name):
            Prompt("a", **{name: value})
    one = Prompt([(0, "a"), (8, "b")])
    prompts.check_times([one, "a"], 8.1)
    with pytest.raises(UserError, match="a text begins at 8 s, and the clip ends at 8 s"):
        prompts.check_times(["a", one], 8)
    with pytest.raises(UserError, match="begins at 9 s"):
        prompts.check_times([Prompt("a", negative=[(0, "b"), (9, "c")])], 8)


def test_shares_go_over_within_the_fade():
    prompt = Prompt([(0, "a"), (4, [("b", 1), ("c", 3)])], fade=2)
    found = shares(prompt, 400)
    np.testing.assert_allclose(found.sum(1), 1)
    np.testing.assert_array_equal(found[:150], [[1, 0, 0]] * 150)
    np.testing.assert_array_equal(found[250:], [[0, 0.25, 0.75]] * 150)
    # Between them linear; the frames at the change are half way, one on either side.
    np.testing.assert_allclose(found[199:201, 0], [0.505, 0.495])
    sharp = shares(dataclasses.replace(prompt, fade=0), 400)
    np.testing.assert_array_equal(sharp[:, 0], np.arange(400) < 200)
    # A text that is shorter than the fade is never heard alone.
    short = shares(Prompt([(0, "a"), (4, "b"), (4.5, "a")], fade=2), 400)
    assert short[:, 1].max() == pytest.approx(0.25)
    np.testing.assert_allclose(short.sum(1), 1)


def timelines(count=60):
    """Timelines, fades, beginnings and lengths of parts."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        times = rng.choice(np.arange(1, 300), size=rng.integers(1, 6), replace=False)
        later = [(t / 10, WORDS[(i + 1) % 3]) for i, t in enumerate(sorted(times.tolist()))]
        fade = rng.choice([0, 0.3, 1, 5])
        yield [(0, "a"), *later], float(fade), rng.integers(-100, 400) / 10, rng.integers(1, 50)


def test_a_part_is_steered_as_in_the_whole():
    for text, fade, start, seconds in timelines():
        whole = Prompt(text, negative=[(0, "b"), (9, "c")], fade=fade)
        start = abs(start)
        part = prompts.within(whole, start, start + seconds)
        nested = prompts.within(prompts.within(whole, start - 1, start + 60), 1, 1 + seconds)
        first, frames = round(start * RATE), round(seconds * RATE)
        for negative in (False, True):
            expected = shares(whole, first + frames, negative=negative)[first:]
            for one in (part, nested):
                found = shares(one, frames, negative=negative)
                np.testing.assert_allclose(found, expected, atol=1e-6)


def test_on_a_ring_texts_come_round_again():
    period = 31.0
    for text, fade, start, seconds in timelines():
        part = prompts.within(Prompt(text, fade=fade), start, start + seconds, period)
        # The ring, unrolled by hand around the window.
        turns = range(int(start // period) - 1, int((start + seconds) // period) + 2)
        unrolled = [(t + (n - turns[0]) * period, words) for n in turns for t, words in text]
        whole = Prompt(unrolled, fade=fade, start=start - turns[0] * period)
        part = Prompt(part, fade=fade) if isinstance(part, str) else part
        frames = round(seconds * RATE)
        np.testing.assert_allclose(shares(part, frames), shares(whole, frames), atol=1e-6)


def test_parts_leave_out_what_cannot_be_heard():
    long = Prompt([(i, f"text {i}") for i in range(60)], fade=1)
    part = prompts.within(long, 20.6, 22.4)
    assert prompts.texts_in(part.sections) == ["text 20", "text 21", "text 22"]
    assert prompts.within(long, 30.7, 30.8).start == 30.7
    assert prompts.within(Prompt([(0, "a"), (5, "b")]), 6, 8) == "b"
    assert prompts.within("a", 3, 4) == "a"


def test_a_clip_that_begins_earlier_and_a_prompt_without_a_text():
    own = Prompt([(0, "a"), (3, "b")], negative="c", fade=2)
    assert prompts.later(own, 2) == Prompt([(0, "a"), (5, "b")], negative="c", fade=2)
    assert prompts.later("a", 2) == "a"
    assert prompts.completed("x", own) == "x" and prompts.completed(Prompt("x"), own) == Prompt("x")
    assert prompts.completed(Prompt(None, negative="x"), own).negative == "x"
    assert prompts.completed(Prompt(None, negative="x"), own).sections == own.sections
    assert prompts.completed(Prompt(None), own) == own
    assert prompts.completed(Prompt(None, negative="x"), "a") == Prompt("a", negative="x")
