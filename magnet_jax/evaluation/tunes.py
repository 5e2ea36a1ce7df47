"""Whether clips have tunes: statistics of their notes, beside those of real clips and of ruins.

FAD, KL and tags hear what music sounds like, and not which notes follow which: one clip's drone
and another one's melody on the same instrument score alike. A ruin is a real clip whose tune is
destroyed and whose sound is kept; a score of tunes must tell it from the clip.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from magnet_jax.errors import UserError, first_line
from magnet_jax.evaluation import metrics, scores
from magnet_jax.evaluation.notes import (
    Notes,
    as_notes,
    attacks,
    f1,
    find_notes,
    statistics,
)
from magnet_jax.evaluation.scores import Listening, Settings
from magnet_jax.evaluation.transcriber import SAMPLE_RATE, Transcriber, transcribe

# What the tune distance is made of. Attacks are left out, which a codec blurs and no tune needs.
DISTANCE = ("entropy", "in_key", "note_seconds", "speed", "steps", "leaps", "voices")

Seed = int | tuple[int, int]

_BLOCK = round(0.3 * SAMPLE_RATE)
_FADE = round(0.01 * SAMPLE_RATE)  # from block to block, without a click


class Played(NamedTuple):
    """What is heard in a clip."""

    notes: Notes
    seconds: float
    attacks: float
    """A second."""


class Wanted(NamedTuple):
    """What a clip is held against, as far as it is known."""

    key: frozenset[int] | None = None
    speed: str | None = None
    real: Notes | None = None
    """What is heard in the real clip of its name."""
    written: Notes | None = None
    """What was played in that clip, as its data set says."""


# --- ruins ----------------------------------------------------------------------------------------


def shuffled(wav_N: np.ndarray, seed: Seed) -> np.ndarray:
    """A clip's blocks of 0.3 s in random order."""
    count = max(len(wav_N) // _BLOCK, 1)
    order = np.random.default_rng(seed).permutation(count)
    return _joined([wav_N[i * _BLOCK :][: _BLOCK + _FADE] for i in order])


def looped(wav_N: np.ndarray, seed: Seed) -> np.ndarray:
    """A clip's loudest block of 0.3 s again and again; nothing is drawn."""
    first = _loudest(wav_N)
    return _joined([wav_N[first:][: _BLOCK + _FADE]] * max(len(wav_N) // _BLOCK, 1))


def drone(wav_N: np.ndarray, seed: Seed) -> np.ndarray:
    """A clip's loudest block of 0.3 s held: its spectrum with new phases, overlapped and added."""
    block_N = wav_N[_loudest(wav_N) :][:_BLOCK]
    hop = max(len(block_N) // 2, 1)
    window_N = np.hanning(len(block_N) + 1)[:-1]
    magnitude_F = np.abs(np.fft.rfft(block_N * window_N))
    random = np.random.default_rng(seed)
    held_N = np.zeros(len(wav_N) + 2 * len(block_N))
    for first in range(0, len(wav_N) + hop, hop):
        phases_F = np.exp(2j * np.pi * random.random(len(magnitude_F)))
        sound_N = np.fft.irfft(magnitude_F * phases_F, len(block_N)) * window_N
        held_N[first:][: len(block_N)] += sound_N
    held_N = held_N[hop:][: len(wav_N)]
    loudness = np.sqrt(np.mean(np.square(block_N)) / max(np.mean(np.square(held_N)), 1e-12))
    return (held_N * loudness).astype(np.float32)


RUINS: dict[str, Callable[[np.ndarray, Seed], np.ndarray]] = {
    "shuffled blocks": shuffled,
    "one block looped": looped,
    "drone": drone,
}


def _loudest(wav_N: np.ndarray) -> int:
    """Where the loudest block begins, of those a tenth of a block apart."""
    sums_N = np.pad(np.square(wav_N, dtype=np.float64).cumsum(), (1, 0))
    firsts = np.arange(0, max(len(wav_N) - _BLOCK - _FADE, 0) + 1, _BLOCK // 10)
    lasts = np.minimum(firsts + _BLOCK, len(wav_N))
    return int(firsts[(sums_N[lasts] - sums_N[firsts]).argmax()])


def _joined(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Blocks one after another, each faded into the next."""
    joined_N = np.zeros(len(blocks) * _BLOCK + _FADE, np.float32)
    up_N = np.linspace(0, 1, _FADE, endpoint=False, dtype=np.float32)
    for i, block_N in enumerate(blocks):
        block_N = np.pad(block_N, (0, _BLOCK + _FADE - len(block_N)))
        block_N[:_FADE] *= up_N
        block_N[-_FADE:] *= 1 - up_N
        joined_N[i * _BLOCK :][: len(block_N)] += block_N
    return joined_N[: len(blocks) * _BLOCK]


# --- hearing --------------------------------------------------------------------------------------


def hear(
    transcriber: Transcriber,
    files: Mapping[str, Path],
    listening: Listening,
    *,
    ruin: str | None = None,
    seed: int = 0,
    cache: Path | None = None,
    what: str = "clips",
) -> dict[str, Played]:
    """What is heard in each clip.

    Args:
      transcriber, files, listening: what hears, what, and how.
      ruin: one of `RUINS`, to hear what it makes of the clips; `seed` is of what it draws.
      cache: folder that results are kept in, under the hash of all they depend on.
      what: names the clips for the progress bar.
    """
    path = None
    if cache is not None:
        key = [_rules(), scores.digest(files), transcriber.sha256, ruin, ruin and seed]
        key += list(dataclasses.astuple(listening))
        path = cache / f"notes-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
        if path.exists():
            return _read_kept(path)
    played = {}
    progress = tqdm(files.items(), desc=f"notes: {what}", unit="clip", leave=False, delay=2)
    for number, (name, file) in enumerate(progress):
        wav_N = scores.read_mono(file, SAMPLE_RATE, listening)
        if ruin is not None:
            wav_N = RUINS[ruin](wav_N, (seed, number))
        notes = find_notes(transcribe(transcriber, wav_N))
        played[name] = Played(notes, len(wav_N) / SAMPLE_RATE, attacks(wav_N))
    if path is not None:
        _keep(path, played)
    return played


@functools.cache
def _rules() -> str:
    """A hash of the code that hears, by whose rules what is kept was heard."""
    modules = {inspect.getmodule(part) for part in (transcribe, find_notes, hear)}
    source = "".join(sorted(inspect.getsource(module) for module in modules))
    return hashlib.sha256(source.encode()).hexdigest()


def _keep(path: Path, played: Mapping[str, Played]) -> None:
    rows = [np.stack(clip.notes, 1) for clip in played.values()]
    scores.write_kept(
        path,
        names=np.array(list(played)),
        counts=np.array([len(row) for row in rows]),
        notes=np.concatenate(rows),
        rest=np.array([clip[1:] for clip in played.values()]),
    )


def _read_kept(path: Path) -> dict[str, Played]:
    with scores.reading_kept(path) as held:
        rows = np.split(held["notes"], np.cumsum(held["counts"])[:-1])
        clips = zip(held["names"].tolist(), rows, held["rest"].tolist(), strict=True)
        return {name: Played(as_notes(row.tolist()), *rest) for name, row, rest in clips}


def written_notes(clip: Path) -> Notes | None:
    """The notes in the .notes beside a clip; None without one.

    A line has start and end in seconds and a MIDI pitch, as launch.recipe writes them. Raises
    `UserError` for a file of anything else.
    """
    path = clip.with_suffix(".notes")
    try:
        rows_M3 = np.loadtxt(path, ndmin=2) if path.stat().st_size else np.zeros((0, 3))
        if rows_M3.shape[1] != 3 or (rows_M3 < 0).any() or not np.isfinite(rows_M3).all():
            raise ValueError("a line needs start, end and pitch, none below 0")
        if (rows_M3[:, 2] % 1).any():
            raise ValueError("a pitch is a whole number, as MIDI has it")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: holds no notes ({first_line(error)})") from None
    return as_notes(rows_M3.tolist())


# --- scores ---------------------------------------------------------------------------------------


def values_of(played: Mapping[str, Played], wanted: Mapping[str, Wanted]) -> dict[str, np.ndarray]:
    """Of each statistic the clips' values, NaN where one does not apply."""
    rows = []
    for name, clip in played.items():
        held = wanted.get(name, Wanted())
        row = statistics(clip.notes, clip.seconds, held.key) | {"attacks": clip.attacks}
        for key, notes in (("note_f1", held.real), ("written_f1", held.written)):
            row[key] = (
                float("nan") if notes is None else f1(_until(notes, clip.seconds), clip.notes)
            )
        rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _until(notes: Notes, seconds: float) -> Notes:
    """Those that begin in so many seconds: a shorter clip has no time for the others."""
    return Notes(*(part_M[notes.starts_M < seconds] for part_M in notes))


def add_speed(
    values: Mapping[str, np.ndarray],
    speeds: Sequence[str | None],
    real: Mapping[str, np.ndarray],
    real_speeds: Sequence[str | None],
) -> dict[str, np.ndarray]:
    """Adds 'speed': a clip's notes a second, as a multiple of real clips' of the same word.

    Args:
      values, real: of clips and of real clips, from `values_of`.
      speeds, real_speeds: of each of them the word, or None. Clips of a word that no real clip
        has, such as none, are compared with all real clips.
    """
    usual = real["notes"].mean()
    rates = {
        speed: real["notes"][[other == speed for other in real_speeds]].mean()
        for speed in set(real_speeds) - {None}
    }
    expected = np.array([rates.get(speed, usual) for speed in speeds])
    return {**values, "speed": values["notes"] / np.where(expected > 0, expected, np.nan)}


def score(
    values: Mapping[str, np.ndarray],
    real: Mapping[str, np.ndarray] | None,
    settings: Settings,
) -> dict[str, Any]:
    """The means of statistics, and how far they are from real clips'.

    Args:
      values: of the clips, from `values_of`.
      real: of real clips.
      settings: of the intervals.

    Returns:
      'clips', the statistics and 'distance', each a dict of value, low, high and the number of
      clips behind it.
    """
    count = len(values["notes"])
    found: dict[str, Any] = {"clips": count}
    for key, values_N in values.items():
        values_N = values_N[~np.isnan(values_N)]
        if len(values_N):
            result = metrics.mean(values_N, resamples=settings.resamples, seed=settings.seed)
            found[key] = {**result._asdict(), "clips": len(values_N)}
    if real is not None and _units(real):
        found["distance"] = {**_distance(values, real, settings)._asdict(), "clips": count}
    return found


def score_reference(values: Mapping[str, np.ndarray], settings: Settings) -> dict[str, Any]:
    """Real clips scored as if they were generated.

    'distance' is how far two draws of as many of them lie from each other by chance.
    """
    found = score(values, None, settings)
    count, units = len(values["notes"]), _units(values)
    if not units:
        return found
    random = np.random.default_rng(settings.seed)
    apart = []
    for _ in range(max(settings.resamples, 1)):
        first, second = (
            {key: values_N[drawn_N] for key, values_N in values.items()}
            for drawn_N in random.integers(0, count, (2, count))
        )
        apart.append(_apart(first, _means(second), units))
    ends = np.percentile(apart, [2.5, 97.5]).tolist() if settings.resamples else (None, None)
    result = metrics.Score(float(np.mean(apart)), *ends)
    found["distance"] = {**result._asdict(), "clips": count}
    return found


def _distance(
    values: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray], settings: Settings
) -> metrics.Score:
    """How many of real clips' standard deviations the means lie from theirs, on average.

    A draw repeats clips, which by itself raises a distance: so the interval is moved onto the
    measured value, as a FAD's.
    """
    means, units = _means(real), _units(real)

    def measure(drawn_N: np.ndarray) -> float:
        return _apart({key: row_N[drawn_N] for key, row_N in values.items()}, means, units)

    count = len(values["notes"])
    value = measure(np.arange(count))
    return metrics.moved(value, measure, count, resamples=settings.resamples, seed=settings.seed)


def _apart(
    values: Mapping[str, np.ndarray], means: Mapping[str, float], units: Mapping[str, float]
) -> float:
    found = _means(values)
    apart = [abs(found[k] - means[k]) / units[k] for k in units if k in found and k in means]
    return float(np.mean(apart))


def _means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of the statistics that apply to any of the clips."""
    return {
        key: float(np.nanmean(values[key]))
        for key in DISTANCE
        if key in values and not np.isnan(values[key]).all()
    }


def _units(real: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The standard deviation over real clips of each statistic in which these differ at all.

    Real clips without notes, such as noises, differ in none: then there is no distance.
    """
    units = {key: float(np.nanstd(real[key])) for key in _means(real)}
    return {key: unit for key, unit in units.items() if unit > 1e-9}
