"""A first stream of tokens that says which notes sound: the nearest of some log spectra.

An EnCodec's first codebook mostly spells where in its period a wave is, which no text tells. Here
a frame's token is the nearest centroid of its magnitudes in bands spaced as notes are, which have
no phase. It is ours, not the paper's. A codec so made keeps the stream as its first codebook, whose
vectors are zeros: decoders, which add vectors up, hear the other codebooks alone.
"""

import dataclasses
from typing import Annotated, NamedTuple

import numpy as np

from magnet_jax.arguments import Between, check_fields
from magnet_jax.errors import UserError

_MOST_SAMPLES = 2**22  # of windows that are in memory at once
_MOST_FRAMES = 4096  # whose distances to all centroids are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum:
    """How a token frame is heard; the section "tonal" of a codec's config.json."""

    window_seconds: Annotated[float, Between(0.001, 1)] = 0.096
    """Length of the Hann window around the middle of a frame."""
    bands: Annotated[int, Between(2, 1024)] = 84
    """How many; 84 from 60 to 7500 Hz are a semitone apart."""
    lowest_hz: Annotated[float, Between(1, 1e5)] = 60.0
    """Middle of the lowest band."""
    highest_hz: Annotated[float, Between(1, 1e5)] = 7500.0
    """Middle of the highest."""
    floor_db: Annotated[float, Between(-160, 0)] = -70.0
    """Magnitude, below a sine of full scale, under which all counts as silence."""
    level: Annotated[float, Between(0, 1)] = 0.25
    """How much of a frame's loudness counts beside the shape of its spectrum."""

    def __post_init__(self):
        check_fields(self, "")


class Tonal(NamedTuple):
    """The stream of a codec."""

    spectrum: Spectrum
    centroids_CM: np.ndarray  # float32: an entry's levels in M bands, as `levels` gives them


def window_samples(spectrum: Spectrum, sample_rate: int) -> int:
    """Length of the window, at least 2."""
    return max(2, round(spectrum.window_seconds * sample_rate))


def check_rate(spectrum: Spectrum, sample_rate: int, where: str) -> None:
    """Raises `UserError` where the bands are not below half of a rate, one above another."""
    if not spectrum.lowest_hz < spectrum.highest_hz < sample_rate / 2:
        raise UserError(
            f"{where}: lowest_hz {spectrum.lowest_hz:g} must lie below highest_hz "
            f"{spectrum.highest_hz:g}, and that below half of {sample_rate} Hz"
        )


def reach(spectrum: Spectrum, sample_rate: int, hop: int) -> tuple[int, int]:
    """Frames before and after a frame that its token hangs on."""
    window = window_samples(spectrum, sample_rate)
    first = (hop - window) // 2
    return max(0, -(first // hop)), max(0, -(-(first + window) // hop) - 1)


def levels(wav_BN: np.ndarray, spectrum: Spectrum, sample_rate: int, hop: int) -> np.ndarray:
    """What is heard in each token frame: float64 [B, ceil(N / hop), M]; silence is all zeros.

    Natural logarithms of magnitudes over the floor, each frame's mean over the bands scaled by
    `spectrum.level`. Windows lie around the middle of frames, with zeros beyond the ends. A frame
    is a function of the samples in its window alone, whatever else is computed with it: sums are
    in float64, whose rounding decides between no two centroids.
    """
    batch, samples = wav_BN.shape
    frames, window = -(-samples // hop), window_samples(spectrum, sample_rate)
    before = max(0, -((hop - window) // 2))
    first = before + (hop - window) // 2
    behind = max(0, first + (frames - 1) * hop + window - before - samples)
    padded_BN = np.pad(wav_BN, ((0, 0), (before, behind)))
    windows_BTW = np.lib.stride_tricks.sliding_window_view(padded_BN, window, axis=1)
    windows_BTW = windows_BTW[:, first::hop][:, :frames]
    weight_W = np.hanning(window + 1)[:-1]
    weight_W = weight_W / (weight_W.sum() / 2)  # a sine of full scale has magnitude 1
    filters_FM = _filters(spectrum, window, sample_rate) / 10 ** (spectrum.floor_db / 20)
    found_BTM = np.empty((batch, frames, spectrum.bands))
    step = max(1, _MOST_SAMPLES // (batch * window))
    for begin in range(0, frames, step):
        part = slice(begin, begin + step)
        magnitudes_BTF = np.abs(np.fft.rfft(windows_BTW[:, part] * weight_W))
        found_BTM[:, part] = np.log1p(magnitudes_BTF @ filters_FM)
    return found_BTM - (1 - spectrum.level) * found_BTM.mean(2, keepdims=True)


def _filters(spectrum: Spectrum, window: int, sample_rate: int) -> np.ndarray:
    """Weights [F, M] of an FFT's bins in each band, which add up to 1.

    Triangles as wide to each side as the distance of two bands, and at least as that of two bins.
    """
    middles_M = np.geomspace(spectrum.lowest_hz, spectrum.highest_hz, spectrum.bands)
    ratio = (spectrum.highest_hz / spectrum.lowest_hz) ** (1 / (spectrum.bands - 1))
    widths_M = np.maximum(middles_M * (ratio - 1), sample_rate / window)
    hertz_F = np.arange(window // 2 + 1) * sample_rate / window
    filters_FM = np.maximum(0, 1 - np.abs(hertz_F[:, None] - middles_M) / widths_M)
    return filters_FM / filters_FM.sum(0)


def nearest(levels_TM: np.ndarray, centroids_CM: np.ndarray) -> np.ndarray:
    """The nearest centroid of each row, the first of those equally near."""
    centroids_CM = centroids_CM.astype(levels_TM.dtype, copy=False)
    squares_C = np.square(centroids_CM).sum(1)
    parts = np.split(levels_TM, range(_MOST_FRAMES, len(levels_TM), _MOST_FRAMES))
    return np.concatenate([(squares_C - 2 * (x @ centroids_CM.T)).argmin(1) for x in parts])


def encode(tonal: Tonal, wav_BCN: np.ndarray, sample_rate: int, hop: int) -> np.ndarray:
    """The stream [B, ceil(N / hop)] (int16) of audio [B, C, N], whose channels are mixed."""
    mono_BN = wav_BCN.astype(np.float64).mean(1)
    heard_BTM = levels(mono_BN, tonal.spectrum, sample_rate, hop)
    found = nearest(heard_BTM.reshape(-1, heard_BTM.shape[2]), tonal.centroids_CM)
    return found.astype(np.int16).reshape(heard_BTM.shape[:2])


def vectors(tonal: Tonal, codebook_size: int, width: int) -> np.ndarray:
    """What stands for entries where a model begins: float32 [V, E], unlike the codec's zeros.

    The centroids, each band brought to mean 0 and variance 1, on their principal axes: all of
    them, or as many as fit. Zeros where there is no entry and no axis.
    """
    centroids_CM = tonal.centroids_CM.astype(np.float64)
    centroids_CM = centroids_CM - centroids_CM.mean(0)
    scale_M = centroids_CM.std(0)
    centroids_CM /= np.where(scale_M > 0, scale_M, 1)
    along_CR, lengths_R, _ = np.linalg.svd(centroids_CM, full_matrices=False)
    along_CR = (along_CR * lengths_R)[:, :width]
    found_VE = np.zeros((codebook_size, width), np.float32)
    found_VE[: along_CR.shape[0], : along_CR.shape[1]] = along_CR
    return found_VE
