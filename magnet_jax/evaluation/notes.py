"""Notes of a clip, from what the transcriber hears, and what they say of its tune.

Plain NumPy. T frames, P pitches, M notes, N samples.
"""

import re
from typing import NamedTuple

import numpy as np
import scipy.signal

from magnet_jax.evaluation.transcriber import FRAME_RATE, LOWEST, SAMPLE_RATE, Posteriors

SPEEDS = ("slow", "moderate", "fast")  # words that captions use, as launch.recipe writes them

_ONSET, _SOUNDING = 0.5, 0.3  # as basic-pitch has them
_SURE = 0.45  # that a note sounds, on average: what is less is mostly another note's harmonic
_SHORTEST = 11  # frames that a note must outlast
_GAP = 11  # frames without sound that end a note
_STEP, _LEAP = 4, 12  # semitones: a step has at most so many, a leap more
_TOLERANCE = 0.08  # seconds by which the beginnings of the same note may differ

_TONICS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_ALTERED = {"flat": -1, "-": -1, "b": -1, "♭": -1, "sharp": 1, "#": 1, "♯": 1}
_KEY = re.compile(
    r"\b([A-G])(?:[ -]?((?i:flat|sharp))|([-b♭#♯]))?[ -]((?i:major|minor))\b"
    r"(?! (?:key|scale|hit)\b)"
)
_SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 9, 10, 11)}


class Notes(NamedTuple):
    """Notes in the order of their beginnings."""

    starts_M: np.ndarray
    """In seconds."""
    ends_M: np.ndarray
    pitches_M: np.ndarray
    """MIDI numbers."""


def find_notes(posteriors: Posteriors) -> Notes:
    """The notes whose beginning is heard, as section 2.3 of the transcriber's paper finds them.

    A note begins where its onset peaks, or where its pitch suddenly sounds, and lasts until it is
    hardly heard for an eighth of a second. The latest notes are taken first, of those at once the
    surest, and what a note takes is not heard again, nor are its neighbours a semitone away. Notes
    that are hardly likely are left out, which is not in the paper: a codec's noise has many.
    """
    left_TP = posteriors.notes_TP.copy()
    onsets_TP = _onsets(posteriors)
    frames, pitches = np.nonzero(_peaks(onsets_TP))
    order = np.lexsort((onsets_TP[frames, pitches], frames))[::-1]
    found = []
    for first, pitch in zip(frames[order], pitches[order]):
        sounding = np.flatnonzero(left_TP[first + 1 :, pitch] >= _SOUNDING)
        gaps = np.flatnonzero(np.diff(sounding, prepend=-1) > _GAP)
        if len(gaps):
            sounding = sounding[: gaps[0]]
        end = first + 1 + (sounding[-1] + 1 if len(sounding) else 0)
        sure = posteriors.notes_TP[first:end, pitch].mean() >= _SURE
        if end - first > _SHORTEST and sure:
            left_TP[first:end, max(0, pitch - 1) : pitch + 2] = 0
            found.append((first / FRAME_RATE, end / FRAME_RATE, pitch + LOWEST))
    return as_notes(found)


def as_notes(rows: list[tuple[float, float, float]]) -> Notes:
    """Start, end and pitch of each note, in any order."""
    starts_M, ends_M, pitches_M = np.array(sorted(rows), np.float64).reshape(-1, 3).T
    return Notes(starts_M, ends_M, pitches_M.astype(int))


def _onsets(posteriors: Posteriors) -> np.ndarray:
    """[T, P]: onsets, and beside them rises of what sounds, scaled to the same maximum."""
    onsets_TP, notes_TP = posteriors.onsets_TP, posteriors.notes_TP
    before_TP = np.pad(notes_TP, ((2, 0), (0, 0)), mode="edge")
    rise_TP = np.minimum(notes_TP - before_TP[1:-1], notes_TP - before_TP[:-2]).clip(0)
    return np.maximum(onsets_TP, rise_TP * onsets_TP.max() / max(float(rise_TP.max()), 1e-9))


def _peaks(onsets_TP: np.ndarray) -> np.ndarray:
    """Where an onset is likely, and likelier than just before and just after."""
    inner_TP = onsets_TP[1:-1]
    is_peak = (inner_TP > onsets_TP[:-2]) & (inner_TP > onsets_TP[2:]) & (inner_TP >= _ONSET)
    return np.pad(is_peak, ((1, 1), (0, 0)))[: len(onsets_TP)]


def statistics(notes: Notes, seconds: float, key: frozenset[int] | None = None) -> dict[str, float]:
    """What a clip's notes say of its tune.

    Where there is nothing to measure, as of a clip without notes, a value is 0.

    Args:
      notes: of the clip.
      seconds: its length.
      key: pitch classes of the key that it should be in, see `key_in`.

    Returns:
      'entropy' of the pitch classes in bits, 'in_key' (NaN without a key) and 'note_seconds'
      (median), the pitch classes weighted by duration; 'notes', onsets a second; 'steps' and
      'leaps', shares of the moves from a note to the next of another pitch that have at most 4
      semitones and more than 12; 'voices', how many notes sound at once, on average.
    """
    lengths_M = notes.ends_M - notes.starts_M
    total = lengths_M.sum()
    share_12 = np.bincount(notes.pitches_M % 12, weights=lengths_M, minlength=12) / max(total, 1e-9)
    moves = np.abs(np.diff(notes.pitches_M))
    moves = moves[moves > 0]
    heard = share_12[share_12 > 0]
    return {
        "entropy": float(-(heard * np.log2(heard)).sum()) + 0.0,
        "in_key": float("nan") if key is None else float(share_12[sorted(key)].sum()),
        "note_seconds": float(np.median(lengths_M)) if len(lengths_M) else 0.0,
        "notes": len(lengths_M) / seconds,
        "steps": float((moves <= _STEP).mean()) if len(moves) else 0.0,
        "leaps": float((moves > _LEAP).mean()) if len(moves) else 0.0,
        "voices": float(total / seconds),
    }


def key_in(text: str) -> frozenset[int] | None:
    """Pitch classes of the key that a text names, as in 'D flat major' or 'F# minor', if any.

    A minor key has the raised sixth and seventh as well. Of several keys the last one counts, as a
    text may begin with an article: "A minor waltz in D major".
    """
    found = [*_KEY.finditer(text)]
    if not found:
        return None
    letter, word, sign, mode = found[-1].groups()
    tonic = _TONICS[letter] + _ALTERED.get((word or sign or "").lower(), 0)
    return frozenset((tonic + step) % 12 for step in _SCALES[mode.lower()])


def speed_in(text: str) -> str | None:
    """The first of `SPEEDS` that a text names, if any."""
    found = re.search(rf"\b({'|'.join(SPEEDS)})\b", text, re.IGNORECASE)
    return found and found[1].lower()


def f1(reference: Notes, found: Notes) -> float:
    """How well notes agree: the harmonic mean of precision and recall.

    A note is right if one of the reference has its pitch and begins within 80 ms of it; each counts
    once. 0 without notes.
    """
    free = np.ones(len(reference.starts_M), bool)
    hits = 0
    for start, pitch in zip(found.starts_M, found.pitches_M):
        apart_M = np.abs(reference.starts_M - start)
        right = np.flatnonzero(free & (reference.pitches_M == pitch) & (apart_M <= _TOLERANCE))
        if len(right):
            free[right[apart_M[right].argmin()]] = False
            hits += 1
    return 2 * hits / max(len(reference.starts_M) + len(found.starts_M), 1)


# --- attacks --------------------------------------------------------------------------------------

_WINDOW, _HOP = 1408, 220  # samples: 64 ms every 10
_LOW, _HIGH, _NUM_BANDS = 60, 7600, 48  # Hz
_APART = 8  # hops at least from one attack to the next
_QUIET = 1e-3  # of the loudest band: what is softer is next to nothing
_FLOOR = 0.02  # of the flux's median: steady sound has next to none, and no attacks


def attacks(wav_N: np.ndarray) -> float:
    """How many times a second a sound suddenly begins, of mono audio at 22,050 Hz.

    They are the peaks of the spectral flux of 48 bands that stand out from its median.
    """
    if len(wav_N) < _WINDOW + 4 * _HOP:
        return 0.0
    frames_TN = np.lib.stride_tricks.sliding_window_view(wav_N, _WINDOW)[::_HOP]
    spectrum_TF = np.abs(np.fft.rfft(frames_TN * np.hanning(_WINDOW)[None]))
    edges = np.geomspace(_LOW, _HIGH, _NUM_BANDS + 1) * _WINDOW / SAMPLE_RATE
    firsts = edges[:-1].round().astype(int)
    lasts = np.maximum(edges[1:].round().astype(int), firsts + 1)
    sums_TF = np.pad(spectrum_TF.cumsum(1), ((0, 0), (1, 0)))
    bands_TC = sums_TF[:, lasts] - sums_TF[:, firsts]
    if not bands_TC.any():
        return 0.0
    usual = max(np.median(bands_TC[bands_TC > 0]), _QUIET * bands_TC.max())
    loudness_TC = np.log1p(10 * bands_TC / usual)
    flux_T = (loudness_TC[2:] - loudness_TC[:-2]).clip(0).mean(1)
    middle = max(float(np.median(flux_T)), _FLOOR)
    peaks, _ = scipy.signal.find_peaks(
        flux_T, distance=_APART, height=2.5 * middle, prominence=1.5 * middle
    )
    return len(peaks) * SAMPLE_RATE / len(wav_N)
