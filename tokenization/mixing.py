"""Two tracks mixed into one: the augmentation of text to sound, which tokens do not allow.

After AudioGen (Kreuk et al. 2023, arXiv 2209.15352) as AudioCraft trains it, there in each batch.
Here it is done once, to whole tracks, before they are encoded. What is mixed, and how, is drawn
from the tracks and a seed alone.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from magnet_jax.errors import UserError
from tokenization.intake.audio import SILENCE_DBFS, Intake, RejectedError, Track
from tokenization.intake.decoder import Decoder, read_audio

MOST_SECONDS = 600.0  # of a track: both are in memory
LEVELS_DBFS = (-35.0, -15.0)  # AudioCraft's
MIN_OVERLAP = 0.5  # AudioCraft's
PEAK = 0.99  # AudioCraft's
_BLOCK = 2**17  # samples handed on at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """A mixed track that has not been made yet."""

    number: int
    parts: tuple[Track, Track]
    snr: float
    """Of the first part over the second, in dB, each measured over all of it."""
    shift: float
    """Where the shorter part begins: from 0, with the longer one, to 1, to end with it."""
    level: float
    """Root mean square of the louder part in dBFS, unless peaks forbid it."""

    @property
    def path(self) -> str:
        return " + ".join(part.path for part in self.parts)

    @property
    def track_id(self) -> str:
        return f"mix {self.number}: {' + '.join(part.track_id for part in self.parts)}"


class Mixed(NamedTuple):
    """A mixed track's audio, and where both parts sound."""

    wav_CN: np.ndarray
    begin: int  # sample at which the shorter part begins
    end: int


def draw(
    tracks: Sequence[Track], *, ratio: float, seed: int, snr: tuple[float, float]
) -> list[Mix]:
    """`ratio` times as many mixes as there are tracks, each of two of them.

    Raises `UserError` if there is one track alone.
    """
    count = round(ratio * len(tracks))
    if count == 0:
        return []
    if len(tracks) == 1:
        raise UserError("--mix-ratio: there is one track to train on, and a mix takes two")
    rng = np.random.default_rng(seed)
    first = rng.integers(len(tracks), size=count)
    second = (first + rng.integers(1, len(tracks), size=count)) % len(tracks)
    drawn = (rng.uniform(*snr, count), rng.uniform(0, 1, count), rng.uniform(*LEVELS_DBFS, count))
    return [
        Mix(number=number, parts=(tracks[i], tracks[j]), snr=snr, shift=shift, level=level)
        for number, (i, j, snr, shift, level) in enumerate(
            zip(*(values.tolist() for values in (first, second, *drawn)))
        )
    ]


def read(mix: Mix, intake: Intake, decoder: Decoder) -> Mixed:
    """Reads both parts whole and mixes them.

    Raises `RejectedError` where a part is not fit or longer than `MOST_SECONDS`, and `UserError`
    if a file is gone.
    """
    intake = replace(intake, max_track_seconds=min(MOST_SECONDS, intake.max_track_seconds))
    wavs, levels = [], []
    for part in mix.parts:
        try:
            wavs.append(read_audio(part, intake, decoder)[0])
            # (the file may have been loud where the codec's rate hears nothing)
            levels.append(_level(wavs[-1]))
            if levels[-1] < SILENCE_DBFS:
                raise RejectedError("silent", f"{levels[-1]:.0f} dBFS at {intake.sample_rate} Hz")
        except RejectedError as error:
            raise RejectedError(error.reason, f"{part.path}: {error.detail}") from None
    wanted = (mix.level + min(0.0, mix.snr), mix.level - max(0.0, mix.snr))
    for wav_CN, level, new in zip(wavs, levels, wanted):
        wav_CN *= np.float32(10 ** ((new - level) / 20))
    short_CN, long_CN = sorted(wavs, key=lambda wav_CN: wav_CN.shape[1])
    begin = round(mix.shift * (long_CN.shape[1] - short_CN.shape[1]))
    end = begin + short_CN.shape[1]
    long_CN[:, begin:end] += short_CN
    peak = max(long_CN.max(), -long_CN.min())
    if peak > PEAK:
        long_CN *= np.float32(PEAK / peak)
    return Mixed(long_CN, begin, end)


def blocks(mixed: Mixed) -> list[np.ndarray]:
    """The audio in pieces [C, n], of which an encoder takes what it wants."""
    return [mixed.wav_CN[:, i : i + _BLOCK] for i in range(0, mixed.wav_CN.shape[1], _BLOCK)]


def as_track(mix: Mix, offset: float) -> Track:
    """What records say of a mix; `offset`: seconds at which the shorter part begins."""
    pairs = itertools.product(*(part.captions for part in mix.parts))
    made_of = {
        "tracks": [part.track_id for part in mix.parts],
        "snr": round(mix.snr, 3),
        "offset": round(offset, 3),
    }
    return Track(
        path=mix.path,
        track_id=mix.track_id,
        place=mix.parts[0].place,
        captions=tuple(dict.fromkeys(itertools.starmap(_joined, pairs))),
        fields=json.dumps({"mixed": made_of}, sort_keys=True),
    )


def is_heard(mixed: tuple[float, float], record: tuple[float, float]) -> bool:
    """Whether a record of a mix holds enough of both parts for the captions of both.

    Given where both sound and where the record lies, in seconds. `MIN_OVERLAP` of the shorter of
    the two will do, so that at least one record of every mix is kept.
    """
    overlap = min(mixed[1], record[1]) - max(mixed[0], record[0])
    shorter = min(mixed[1] - mixed[0], record[1] - record[0])
    return overlap >= MIN_OVERLAP * shorter - 1e-3  # (half and half, and rounded)


def _joined(first: str, second: str) -> str:
    return first if first == second else f"{first} {second}"


def _level(wav_CN: np.ndarray) -> float:
    """Root mean square in dBFS around the mean, as `audio.Facts` has it."""
    total, square = np.zeros(len(wav_CN)), 0.0
    for i in range(0, wav_CN.shape[1], _BLOCK):
        block_CN = wav_CN[:, i : i + _BLOCK].astype(np.float64)
        total += block_CN.sum(1)
        square += np.square(block_CN).sum()
    variance = square / wav_CN.size - np.mean(np.square(total / wav_CN.shape[1]))
    return 10 * math.log10(max(0.0, variance) + 1e-20)
