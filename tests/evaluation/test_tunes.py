"""Tunes beside ruins of them: what destroys a tune is told from it, and what is heard is kept."""

import numpy as np
import pytest
from sounds import cut_file, plucked, put, tone

from magnet_jax.errors import UserError
from magnet_jax.evaluation import notes, scores, transcriber, tunes
from magnet_jax.evaluation.scores import Listening, Settings

RATE = transcriber.SAMPLE_RATE


def test_ruins_have_a_clips_sound_without_its_tune():
    """Of a chirp: what is heard when is seen in how high it is."""
    wav_N = np.sin(2 * np.pi * (200 + 40 * np.arange(6 * RATE) / RATE).cumsum() / RATE)
    wav_N = (wav_N * np.linspace(0.2, 0.4, len(wav_N))).astype(np.float32)

    def heights(wav_N):
        blocks = wav_N.reshape(20, -1)[:, 500:-500]
        return np.array([np.count_nonzero(np.diff(np.sign(block))) for block in blocks])

    rising = heights(wav_N)
    found = {name: ruin(wav_N, 0) for name, ruin in tunes.RUINS.items()}
    assert {len(ruined_N) for ruined_N in found.values()} == {len(wav_N)}
    mixed = heights(found["shuffled blocks"])
    assert np.abs(np.sort(mixed) - rising).max() <= 2 and np.abs(mixed - rising).max() > 20
    for name in ("one block looped", "drone"):
        assert np.ptp(heights(found[name])) <= 8
        assert abs(heights(found[name]).mean() - rising[-1]) < 6  # where it is loudest
    loudness = np.sqrt(np.mean(np.square(found["drone"])))
    assert loudness == pytest.approx(np.sqrt(np.mean(np.square(wav_N[-6615:]))), rel=0.1)
    again = tunes.shuffled(wav_N, 0)
    np.testing.assert_array_equal(again, found["shuffled blocks"])
    assert not np.array_equal(again, tunes.shuffled(wav_N, 1))


@pytest.mark.parametrize("name", tunes.RUINS)
@pytest.mark.parametrize("length", [1, 1000, 6615, 7000])
def test_short_clips_can_be_ruined(name, length):
    ruined_N = tunes.RUINS[name](np.ones(length, np.float32), 0)
    assert len(ruined_N) and np.isfinite(ruined_N).all()


def measured(count, seed, **moved):
    """Statistics of clips, normally distributed about 1 with a deviation of 0.1."""
    random = np.random.default_rng(seed)
    keys = {*tunes.DISTANCE, "notes", "attacks"}
    return {key: random.normal(1 + moved.get(key, 0), 0.1, count) for key in sorted(keys)}


def test_the_distance_is_in_deviations_of_real_clips():
    real, settings = measured(400, 0), Settings()
    found = tunes.score(measured(400, 1, entropy=-0.7, steps=0.35), real, settings)["distance"]
    assert found["low"] < found["value"] < found["high"] and found["clips"] == 400
    expected = (7 + 3.5) / len(tunes.DISTANCE)
    assert found["value"] == pytest.approx(expected, rel=0.1)
    chance = tunes.score_reference(real, settings)["distance"]
    assert 0.01 < chance["value"] < chance["high"] < 0.15 < found["low"]
    assert tunes.score(real, real, settings)["distance"]["value"] == 0
    assert tunes.score(measured(400, 1, attacks=5), real, settings)["distance"]["value"] < 0.15


def test_what_does_not_apply_is_left_out():
    values = measured(4, 0)
    values["in_key"] = np.array([np.nan, 0.5, np.nan, 1.0])
    values["note_f1"] = np.full(4, np.nan)
    found = tunes.score(values, None, Settings(resamples=5))
    assert found["in_key"]["value"] == 0.75 and found["in_key"]["clips"] == 2
    assert "note_f1" not in found and "distance" not in found


def test_a_shorter_clip_is_held_against_what_it_had_time_for():
    whole = notes.as_notes([(0, 1, 60), (1, 2, 62), (5, 6, 64)])
    half = tunes.Played(notes.as_notes([(0, 1, 60), (1, 2, 62)]), 3.0, 0.0)
    found = tunes.values_of({"a": half}, {"a": tunes.Wanted(real=whole, written=whole)})
    assert found["note_f1"] == found["written_f1"] == 1


def test_real_clips_without_notes_give_no_distance():
    values = dict.fromkeys(measured(3, 0), np.zeros(3))
    for found in (
        tunes.score(measured(3, 0), values, Settings()),
        tunes.score_reference(values, Settings()),
    ):
        assert "distance" not in found and found["entropy"]["clips"] == 3


def test_speed_is_that_of_real_clips_of_the_same_word():
    real = {"notes": np.array([2.0, 4.0, 9.0])}
    values = {"notes": np.array([3.0, 3.0, 5.0])}
    found = tunes.add_speed(values, ["slow", "fast", None], real, ["slow", "slow", "fast"])
    np.testing.assert_allclose(found["speed"], [1, 1 / 3, 1])


def test_what_is_heard_is_kept(tmp_path, monkeypatch):
    for name in "ab":
        put(tmp_path / "real" / f"{name}.wav", tone(1.0, frequency=440 if name == "a" else 30_000))
    files, cache = scores.find_audio(tmp_path / "real"), tmp_path / "cache"
    network = transcriber.load()
    first = tunes.hear(network, files, Listening(), cache=cache)
    monkeypatch.setattr(tunes, "transcribe", lambda *args: pytest.fail("heard again"))
    again = tunes.hear(network, files, Listening(), cache=cache)
    assert first["a"].seconds == again["a"].seconds == 1 and list(again) == ["a", "b"]
    for name in "ab":
        np.testing.assert_equal(first[name], again[name])
    monkeypatch.setattr(tunes, "transcribe", lambda *args: transcriber.Posteriors(*SILENCE))
    for changed in ({"ruin": "drone"}, {"ruin": "drone", "seed": 1}):
        tunes.hear(network, files, Listening(), cache=cache, **changed)
    tunes.hear(network, files, Listening(seconds=0.5), cache=cache)
    monkeypatch.setattr(tunes, "_rules", lambda: "others")
    tunes.hear(network, files, Listening(), cache=cache)
    assert len(list(cache.iterdir())) == 5
    for path in cache.iterdir():
        cut_file(path)
    with pytest.raises(UserError, match=r"notes-.*\.npz: damaged"):
        tunes.hear(network, files, Listening(), cache=cache)


SILENCE = np.zeros((2, 50, 88), np.float32)


def test_notes_beside_a_clip_are_read(tmp_path):
    clip = tmp_path / "a.flac"
    assert tunes.written_notes(clip) is None
    clip.with_suffix(".notes").write_text("0.0000\t0.5\t60\n0.5\t1.0\t64\n9.0\t9.5\t62\n")
    assert tunes.written_notes(clip).pitches_M.tolist() == [60, 64, 62]
    clip.with_suffix(".notes").write_text("")
    assert not len(tunes.written_notes(clip).starts_M)
    for text in ("a melody\n", "0.5 60\n", "0 nan 60\n", "0 1 60.5\n", "0 1 60\n0 1\n"):
        clip.with_suffix(".notes").write_text(text)
        with pytest.raises(UserError, match=r"a\.notes: holds no notes"):
            tunes.written_notes(clip)


def test_a_melody_is_told_from_its_ruins():
    """The transcriber hears all of them; a drone's pitches hardly move."""
    moves = np.random.default_rng(0).integers(-3, 4, 12)
    wav_N = plucked(60 + np.abs(moves.cumsum()), 0.4, RATE)
    network = transcriber.load()

    def heard(wav_N):
        found = notes.find_notes(transcriber.transcribe(network, wav_N))
        return notes.statistics(found, len(wav_N) / RATE)

    tune = heard(wav_N)
    assert tune["entropy"] > 1.5 and tune["steps"] > 0.7
    for ruin in (tunes.looped, tunes.drone):
        assert heard(ruin(wav_N, 0))["entropy"] < tune["entropy"] - 0.5
    shuffled = heard(tunes.shuffled(wav_N, 0))
    assert shuffled["note_seconds"] < tune["note_seconds"]
