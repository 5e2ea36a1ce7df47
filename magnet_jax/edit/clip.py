"""Clips that are edited, and edited clips: samples in the numbers in which they were given."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from magnet_jax.arguments import as_array, as_name, check_samples
from magnet_jax.errors import UserError
from magnet_jax.io import exact
from magnet_jax.io.exact import Source
from magnet_jax.prompts import Description

_SUBTYPES = {
    np.dtype(np.int16): "PCM_16",
    np.dtype(np.int32): "PCM_32",
    np.dtype(np.float32): "FLOAT",
    np.dtype(np.float64): "DOUBLE",
}


def _as_audio(value: Any, name: str) -> Path | np.ndarray:
    """A path, or samples [B, C, N] of any number."""
    if isinstance(value, str | Path):
        return Path(as_name(value, name))
    array = as_array(value, name)
    given = f"{array.dtype} {list(array.shape)}"
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.dtype not in _SUBTYPES:
        raise UserError(
            f"{name} must be a file, or samples [B, C, N] or [C, N], float32, float64, int16 or "
            f"int32, not {given}"
        )
    check_samples(array, name)
    return array


Audio = Annotated[np.ndarray | str | Path, _as_audio]


class Clip(NamedTuple):
    """A clip to be edited."""

    source: Source
    codes_KT: np.ndarray
    own: bool  # the samples are what the codec makes of the tokens
    text: Description


class Edit(NamedTuple):
    """Edited clips."""

    wav_BCN: np.ndarray  # in the numbers, at the rate and of the channels of what was edited
    tokens_BKT: np.ndarray  # int32
    changed: list[list[tuple[int, int]]]  # of each clip samples [first, end); all others are as
    sample_rate: int  # they were
    clips: list[Clip]  # what was edited
    before: int = 0  # samples that come before the first one of what was edited

    def as_float(self, clip: int = 0) -> np.ndarray:
        """A clip [C, N] in [-1, 1)."""
        source = self.clips[clip].source
        samples_NC = _as_held(self.wav_BCN[clip].T, source)
        return source._replace(samples_NC=samples_NC).as_float().T

    def write(self, path: str | Path, clip: int = 0) -> None:
        """Writes a clip as the file that was edited is written, its other bytes untouched."""
        source = self.clips[clip].source
        samples_NC = _as_held(self.wav_BCN[clip].T, source)
        exact.write(Path(path), source, samples_NC, before=self.before)


def source_of(samples_CN: np.ndarray, sample_rate: int) -> Source:
    """Samples as those of a file."""
    held_NC = samples_CN.T
    if samples_CN.dtype == np.int16:
        held_NC = held_NC.astype(np.int32) << 16
    return Source(Path("audio"), held_NC, sample_rate, _SUBTYPES[samples_CN.dtype])


def as_given(samples_NC: np.ndarray, source: Source) -> np.ndarray:
    """A file's samples as people read them: int16, int32, float32 or float64."""
    return (samples_NC >> 16).astype(np.int16) if source.subtype == "PCM_16" else samples_NC


def _as_held(samples_NC: np.ndarray, source: Source) -> np.ndarray:
    return samples_NC.astype(np.int32) << 16 if source.subtype == "PCM_16" else samples_NC
