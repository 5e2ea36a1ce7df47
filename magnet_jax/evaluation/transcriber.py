"""basic-pitch, a trained transcriber, in JAX: which notes sound and begin in each frame of a clip.

Bittner, Bosch, Rubinstein, Meseguer-Brocal and Ewert, "A lightweight instrument-agnostic model for
polyphonic note transcription and multipitch estimation" (ICASSP 2022). The weights ship with this
package (`launch.make.transcriber` made them), so that tunes can be judged without a download.

The network hears windows of two seconds. This cuts a clip so that windows meet at whole frames;
basic-pitch's own cut does not, and its frames drift by 0.7 %.

W windows, N samples, T frames, F bins of a third of a semitone, H harmonics, P pitches, C channels.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.config import ASSETS
from magnet_jax.errors import UserError
from magnet_jax.io.files import read_tensors

SAMPLE_RATE = 22_050
HOP = 256
FRAME_RATE = SAMPLE_RATE / HOP
WINDOW_SAMPLES = 2 * SAMPLE_RATE - HOP
WINDOW_FRAMES = 172
NUM_PITCHES = 88
LOWEST = 21  # the MIDI number of the first pitch, A0

_KERNEL_SAMPLES = 256  # of the constant-Q kernels, and of the low-pass filter between octaves
_OCTAVES = 9
_OCTAVE_BINS = 36
_BINS = 3 * NUM_PITCHES  # that the network hears of each harmonic
# Harmonics 1/2, 1, 2, ... 7 of a bin lie so many bins above it.
_HARMONICS = tuple(round(_OCTAVE_BINS * float(np.log2(h))) for h in (0.5, 1, 2, 3, 4, 5, 6, 7))
_EDGE = 15  # frames at either end of a window that know too little of what is around them
_STEP = WINDOW_FRAMES - 2 * _EDGE  # frames from window to window
_BATCH = 8  # windows a call; the last one is filled up to a power of two: four programs for all
_PRECISION = jax.lax.Precision.HIGHEST  # float32 means float32 on accelerators too

Params = dict[str, dict[str, jax.Array]]


class Transcriber(NamedTuple):
    """The network."""

    params: Params
    sha256: str
    """Of the file of weights."""


class Posteriors(NamedTuple):
    """How likely each pitch sounds, and begins, in each frame; pitch 0 is MIDI `LOWEST`."""

    notes_TP: np.ndarray
    onsets_TP: np.ndarray


def load(folder: Path = ASSETS / "transcriber") -> Transcriber:
    """The transcriber that ships, or one that `launch.make.transcriber` wrote.

    Raises `UserError` where the file is missing or damaged, or is another model's.
    """
    path = folder / "model.safetensors"
    params: Params = {}
    tensors = read_tensors(path)
    try:
        for name, tensor in tensors.items():
            layer, part = name.split("/")
            params.setdefault(layer, {})[part] = jnp.asarray(tensor, jnp.float32)
        # (the network itself knows best which tensors it needs, of which shapes)
        window_WN = np.zeros((1, WINDOW_SAMPLES), np.float32)
        found = jax.eval_shape(transcribe_windows, params, window_WN)
        fits = all(array.shape == (1, WINDOW_FRAMES, NUM_PITCHES) for array in found)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(
            f"{folder}: holds another model than the transcriber; name a folder that "
            "launch.make.transcriber wrote"
        )
    return Transcriber(params, hashlib.sha256(path.read_bytes()).hexdigest())


def transcribe(transcriber: Transcriber, wav_N: np.ndarray) -> Posteriors:
    """Hears a clip of mono audio at 22,050 Hz.

    Args:
      transcriber: from `load`.
      wav_N: float, full scale 1, at least one sample.

    Returns:
      Posteriors of ceil(N / HOP) frames; frame t is about sample t * HOP.
    """
    windows_WN, num_frames = cut_windows(wav_N)
    found = []
    for first in range(0, len(windows_WN), _BATCH):
        batch_WN = windows_WN[first : first + _BATCH]
        size = 1 << (len(batch_WN) - 1).bit_length()
        filled_WN = np.pad(batch_WN, ((0, size - len(batch_WN)), (0, 0)))
        posteriors = transcribe_windows(transcriber.params, filled_WN)
        found.append([np.asarray(array)[: len(batch_WN)] for array in posteriors])
    return Posteriors(
        *(
            np.concatenate(part)[:, _EDGE:-_EDGE].reshape(-1, NUM_PITCHES)[:num_frames]
            for part in zip(*found)
        )
    )


def cut_windows(wav_N: np.ndarray) -> tuple[np.ndarray, int]:
    """The windows [W, WINDOW_SAMPLES] that hold a clip, and how many frames the clip has."""
    wav_N = np.asarray(wav_N, np.float32)
    if wav_N.ndim != 1 or not wav_N.size:
        raise ValueError(f"wav_N {wav_N.shape}: expected mono audio, [N]")
    num_frames = -(-len(wav_N) // HOP)
    num_windows = -(-num_frames // _STEP)
    padded_N = np.zeros((num_windows - 1) * _STEP * HOP + WINDOW_SAMPLES, np.float32)
    heard_N = wav_N[: len(padded_N) - _EDGE * HOP]
    padded_N[_EDGE * HOP :][: len(heard_N)] = heard_N
    windows = np.lib.stride_tricks.sliding_window_view(padded_N, WINDOW_SAMPLES)
    return windows[:: _STEP * HOP], num_frames


@jax.jit
def transcribe_windows(params: Params, windows_WN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(notes_WTP, onsets_WTP) of windows of `WINDOW_SAMPLES` each."""
    x_WTFH = _stack_harmonics(_log_spectrum(params, windows_WN))
    contours_WTFC = jax.nn.relu(_convolved(x_WTFH, params["contour_1"]))
    contours_WTF1 = jax.nn.sigmoid(_convolved(contours_WTFC, params["contour_2"]))
    notes_WTPC = jax.nn.relu(_convolved(contours_WTF1, params["note_1"], bins=3))
    notes_WTP1 = jax.nn.sigmoid(_convolved(notes_WTPC, params["note_2"]))
    onsets_WTPC = jax.nn.relu(_convolved(x_WTFH, params["onset_1"], bins=3))
    both_WTPC = jnp.concatenate([notes_WTP1, onsets_WTPC], -1)
    onsets_WTP1 = jax.nn.sigmoid(_convolved(both_WTPC, params["onset_2"]))
    return notes_WTP1[..., 0], onsets_WTP1[..., 0]


def _log_spectrum(params: Params, windows_WN: jax.Array) -> jax.Array:
    """Decibels of the constant-Q transform, of range 1 in each window; [W, T, F], lowest first.

    Octaves are heard from the highest down, each with the same kernels, at half the rate of the
    one before.
    """
    octaves, wav_WN = [], windows_WN
    for octave in range(_OCTAVES):
        if octave:
            wav_WN = _halved(wav_WN, params["constant_q"]["low_pass"])
        hop = HOP >> octave
        padded_WN = jnp.pad(wav_WN, ((0, 0), (_KERNEL_SAMPLES // 2,) * 2), mode="reflect")
        starts_T = np.arange(WINDOW_FRAMES) * hop
        frames_WTN = padded_WN[:, starts_T[:, None] + np.arange(_KERNEL_SAMPLES)[None]]
        found_WT2F = jnp.einsum(
            "WTN,N2F->WT2F", frames_WTN, params["constant_q"]["kernels"], precision=_PRECISION
        )
        octaves.insert(0, jnp.square(found_WT2F).sum(2))
    scale_F = params["constant_q"]["scale"]
    power_WTF = jnp.concatenate(octaves, -1)[..., -len(scale_F) :] * _wide(scale_F**2, 3)
    decibels_WTF = 10 * jnp.log10(power_WTF + 1e-10)
    above_WTF = decibels_WTF - decibels_WTF.min((1, 2), keepdims=True)
    range_W11 = above_WTF.max((1, 2), keepdims=True)
    normed_WTF = jnp.where(range_W11 > 0, above_WTF / jnp.where(range_W11 > 0, range_W11, 1), 0)
    norm = params["spectrum"]
    return normed_WTF * _wide(norm["scale"], 3) + _wide(norm["shift"], 3)


def _halved(wav_WN: jax.Array, low_pass_N: jax.Array) -> jax.Array:
    found_WN1 = jax.lax.conv_general_dilated(
        wav_WN[..., None],
        low_pass_N[:, None, None],
        window_strides=(2,),
        padding=((_KERNEL_SAMPLES // 2 - 1,) * 2,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=_PRECISION,
    )
    return found_WN1[..., 0]


def _stack_harmonics(spectrum_WTF: jax.Array) -> jax.Array:
    """What sounds at each harmonic of a bin, [W, T, F, H]; 0 beyond the spectrum."""
    below, above = -min(_HARMONICS), max(_HARMONICS)
    padded_WTF = jnp.pad(spectrum_WTF, ((0, 0), (0, 0), (below, above)))
    return jnp.stack([padded_WTF[..., below + h :][..., :_BINS] for h in _HARMONICS], -1)


def _convolved(x_WTFC: jax.Array, layer: dict[str, jax.Array], bins: int = 1) -> jax.Array:
    """A convolution that keeps time, and every so many-th bin."""
    frames, width = layer["kernel"].shape[:2]
    around: Any = [(frames // 2,) * 2, ((width - bins + bins // 2) // 2,) * 2]
    y = jax.lax.conv_general_dilated(
        x_WTFC,
        layer["kernel"],
        window_strides=(1, bins),
        padding=around,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_PRECISION,
    )
    return y + _wide(layer["bias"], 4)


def _wide(values_C: jax.Array, rank: int) -> jax.Array:
    return values_C.reshape((1,) * (rank - 1) + (-1,))
