"""Notes that are heard in a clip, and what they say of its tune."""

import math

import numpy as np
import pytest
from sounds import plucked

from magnet_jax.evaluation import notes, transcriber
from magnet_jax.evaluation.notes import as_notes

RATE = transcriber.SAMPLE_RATE
MELODY = [60, 62, 64, 67, 65, 64, 62, 72, 71, 67, 69, 60, 55, 64, 62, 60]  # in C major


def test_a_melody_is_transcribed():
    """All ten seconds of it, so that times do not drift where windows meet."""
    found = notes.find_notes(transcriber.transcribe(transcriber.load(), plucked(MELODY, 0.6, RATE)))
    written = as_notes([(0.6 * i, 0.6 * (i + 1), pitch) for i, pitch in enumerate(MELODY)])
    assert notes.f1(written, found) >= 0.9
    (right,) = np.nonzero(np.isin(found.pitches_M, MELODY))
    late_M = (found.starts_M[right] + 0.3) % 0.6 - 0.3
    assert np.abs(late_M).max() < 0.04 and abs(late_M[-4:].mean() - late_M[:4].mean()) < 0.015
    heard = notes.statistics(found, 0.6 * len(MELODY), notes.key_in("C major"))
    assert heard["in_key"] > 0.95 and heard["notes"] == pytest.approx(1 / 0.6, rel=0.15)


def test_notes_begin_at_peaks_and_last_until_they_fade():
    sounds_TP, onsets_TP = np.zeros((2, 100, 88), np.float32)
    sounds_TP[10:40, 39] = 0.9  # MIDI 60
    sounds_TP[20:28, 39] = np.linspace(0.1, 0.9, 8)  # (which is no new beginning)
    sounds_TP[10:40, 40] = 0.5  # what the neighbour hears of it
    onsets_TP[[9, 10, 11], 39] = 0.6, 0.9, 0.6
    onsets_TP[10, 40] = 0.6
    sounds_TP[60:70, 50] = 0.9  # too short
    onsets_TP[60, 50] = 0.9
    sounds_TP[60:90, 70] = 0.4  # another's harmonic, which is hardly likely
    onsets_TP[60, 70] = 0.9
    found = notes.find_notes(transcriber.Posteriors(sounds_TP, onsets_TP))
    assert found.pitches_M.tolist() == [60]
    np.testing.assert_allclose(
        [found.starts_M[0], found.ends_M[0]], np.array([10, 40]) / transcriber.FRAME_RATE
    )


def test_statistics_of_a_few_notes():
    tune = as_notes([(0, 1, 60), (1, 1.5, 64), (1.5, 2, 64), (2, 3, 79), (3, 3.5, 78)])
    found = notes.statistics(tune, 5.0, notes.key_in("C major"))
    shares = np.array([1, 1, 1, 0.5]) / 3.5
    expected = {
        "entropy": -(shares * np.log2(shares)).sum(),
        "in_key": 3 / 3.5,
        "note_seconds": 0.5,
        "notes": 1.0,
        "steps": 2 / 3,
        "leaps": 1 / 3,
        "voices": 0.7,
    }
    assert found == pytest.approx(expected)
    assert math.isnan(notes.statistics(tune, 5.0)["in_key"])
    drone = notes.statistics(as_notes([(0, 5, 60), (0, 5, 72)]), 5.0)
    assert drone["entropy"] == 0 and drone["voices"] == 2 and drone["steps"] == 0
    assert set(notes.statistics(as_notes([]), 5.0, notes.key_in("C major")).values()) == {0.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A slow harp melody in C major", {0, 2, 4, 5, 7, 9, 11}),
        ("A calm tune in D flat major, slow", {1, 3, 5, 6, 8, 10, 0}),
        ("F sharp minor", {6, 8, 9, 11, 1, 2, 3, 4, 5}),
        ("in B- major", {10, 0, 2, 3, 5, 7, 9}),
        ("A minor waltz in Bb Major", {10, 0, 2, 3, 5, 7, 9}),
        ("E-Flat minor", {3, 5, 6, 8, 10, 11, 0, 1, 2}),
        ("A minor key ballad", None),
        ("G#-minor", {8, 10, 11, 1, 3, 4, 5, 6, 7}),
        ("A fast jig on the flute", None),
        ("a minor change", None),
        ("an ABC major hit", None),
    ],
)
def test_keys_are_read_from_words(text, expected):
    assert notes.key_in(text) == expected


def test_speeds_are_read_from_words():
    assert notes.speed_in("A moderate jig, not fast") == "moderate"
    assert notes.speed_in("Slowly, at breakfast") is None


def test_notes_agree_by_pitch_and_beginning():
    tune = as_notes([(0, 1, 60), (1, 2, 62), (2, 3, 64)])
    assert notes.f1(tune, tune) == 1
    assert notes.f1(tune, as_notes([(0.07, 9, 60), (1, 2, 74), (2.09, 3, 64)])) == pytest.approx(
        1 / 3
    )
    assert notes.f1(tune, as_notes([(0, 1, 60), (0.05, 1, 60)])) == pytest.approx(2 / 5)
    assert notes.f1(as_notes([]), as_notes([])) == 0


def test_attacks_are_beginnings_of_sounds():
    assert notes.attacks(plucked(MELODY, 0.6, RATE)) == pytest.approx(1 / 0.6, rel=0.15)
    steady_N = np.sin(np.arange(5 * RATE) * 0.1).astype(np.float32)
    assert notes.attacks(steady_N) < 0.5
    assert notes.attacks(np.zeros(RATE)) == notes.attacks(np.ones(10)) == 0
