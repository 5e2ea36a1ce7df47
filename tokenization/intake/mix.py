"""Two parts read whole and mixed into one; `mixing` draws which, and how."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tokenization.intake import audio
from tokenization.intake.audio import SILENCE_DBFS, Facts, Intake, RejectedError
from tokenization.track import Mix, Part

MOST_SECONDS = 600.0  # of a track: both are in memory
PEAK = 0.99  # AudioCraft's
_BLOCK = 2**17  # samples handed on at once


def decode(mix: Mix, intake: Intake) -> Iterator[np.ndarray | None]:
    """As `audio.decode`: blocks [n, C] of the mix, and None for each block read until then.

    The `Facts` it returns say where both parts sound. Raises `RejectedError` where a part is not
    fit or longer than `MOST_SECONDS`, and OSError with the path of the part.
    """
    intake = replace(intake, max_track_seconds=min(MOST_SECONDS, intake.max_track_seconds))
    wavs = []
    for part, name in zip(mix.parts, mix.names):
        wavs.append((yield from _whole(part, name, intake)))
    wav_CN, begin, end = mixed(mix, *wavs)
    length = wav_CN.shape[1]
    yield from (wav_CN[:, i : i + _BLOCK].T for i in range(0, length, _BLOCK))
    rate, channels = intake.sample_rate, intake.channels
    both = (begin / rate, end / rate)
    seconds = length / rate
    return Facts(format="mix", sample_rate=rate, channels=channels, seconds=seconds, both=both)


def _whole(part: Part, name: str, intake: Intake) -> Iterator[None]:
    """All of a part [C, N], returned; None is yielded for each block of it."""
    blocks = []
    try:
        for block in audio.decode(part, intake):
            blocks.append(block)
            yield None
        wav_CN = np.ascontiguousarray(np.concatenate(blocks).T)
        # The file may have been loud where the codec's rate hears nothing.
        if (level := level_of(wav_CN)) < SILENCE_DBFS:
            raise RejectedError("silent", f"{level:.0f} dBFS at {intake.sample_rate} Hz")
    except RejectedError as error:
        raise RejectedError(error.reason, f"{name}: {error.detail}") from None
    except OSError as error:
        error.filename = part.place.path
        raise
    return wav_CN


def mixed(mix: Mix, *wavs: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The mix of both parts [C, N], which it writes over, and between which samples both sound."""
    wanted = (mix.level + min(0.0, mix.snr), mix.level - max(0.0, mix.snr))
    for wav_CN, level in zip(wavs, wanted):
        wav_CN *= np.float32(10 ** ((level - level_of(wav_CN)) / 20))
    short_CN, long_CN = sorted(wavs, key=lambda wav_CN: wav_CN.shape[1])
    begin = round(mix.shift * (long_CN.shape[1] - short_CN.shape[1]))
    end = begin + short_CN.shape[1]
    long_CN[:, begin:end] += short_CN
    peak = max(long_CN.max(), -long_CN.min())
    if peak > PEAK:
        long_CN *= np.float32(PEAK / peak)
    return long_CN, begin, end


def level_of(wav_CN: np.ndarray) -> float:
    """Root mean square in dBFS around the mean, as `audio.Facts` has it."""
    total, square = np.zeros(len(wav_CN)), 0.0
    for i in range(0, wav_CN.shape[1], _BLOCK):
        block_CN = wav_CN[:, i : i + _BLOCK].astype(np.float64)
        total += block_CN.sum(1)
        square += np.square(block_CN).sum()
    variance = square / wav_CN.size - np.mean(np.square(total / wav_CN.shape[1]))
    return 10 * math.log10(max(0.0, variance) + 1e-20)
