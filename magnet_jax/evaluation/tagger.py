"""musicnn, a trained music tagger, in JAX: 50 tags and an embedding for every three seconds.

Pons and Serra, "musicnn: pre-trained convolutional neural networks for music audio tagging" (ISMIR
2019, late-breaking demo), trained on MagnaTagATune. The weights ship with this package
(`launch.convert_tagger` made them), so that music can be judged without a download. Of the
original this keeps log-mel spectrogram and network; it stays in float32 where musicnn's own code
rounds powers to float16, which overflows on loud audio.

P patches, N samples, T frames, M mel bands, C channels, E the embedding's width, L tags.
"""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.config import ASSETS
from magnet_jax.errors import UserError
from magnet_jax.io.files import read_object, read_tensors

SAMPLE_RATE = 16_000
FFT_SIZE, HOP, NUM_MELS = 512, 256, 96
PATCH_FRAMES = 187  # 3 seconds
PATCH_SAMPLES = (PATCH_FRAMES - 1) * HOP + FFT_SIZE
STEP_FRAMES = 94  # between patches: they overlap by half

_BATCH = 8  # patches a call; the last one is filled up, so that one program serves all lengths
_PRECISION = jax.lax.Precision.HIGHEST  # float32 means float32 on accelerators too

Params = dict[str, dict[str, jax.Array]]


class Tagger(NamedTuple):
    """The network and what its outputs are called."""

    params: Params
    tags: tuple[str, ...]
    sha256: str
    """Of the file of weights."""


class Tagged(NamedTuple):
    """What the network says of each patch of a clip."""

    logits_PL: np.ndarray
    """Of each tag by itself: a patch may have several, or none."""
    embeddings_PE: np.ndarray
    """The last hidden layer, 200 wide."""


def load(folder: Path = ASSETS / "tagger") -> Tagger:
    """The tagger that ships, or one that `launch.convert_tagger` wrote.

    Raises `UserError` where a file is missing or damaged, or is another model's.
    """
    path = folder / "model.safetensors"
    tensors = read_tensors(path)
    tags = read_object(folder / "config.json", "it names the tagger's tags").get("tags")
    params: Params = {}
    try:
        for name, tensor in tensors.items():
            layer, part = name.split("/")
            params.setdefault(layer, {})[part] = jnp.asarray(tensor, jnp.float32)
        # (the network itself knows best which tensors it needs, of which shapes)
        logits_PL, _ = jax.eval_shape(_heard, params, np.zeros((1, PATCH_SAMPLES), np.float32))
        fits = isinstance(tags, list) and logits_PL.shape[-1] == len(tags)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits or not all(isinstance(name, str) for name in tags):
        raise UserError(
            f"{folder}: holds another model than the tagger; name a folder that "
            "launch.convert_tagger wrote"
        )
    return Tagger(params, tuple(tags), hashlib.sha256(path.read_bytes()).hexdigest())


def tag(tagger: Tagger, wav_N: np.ndarray, step_frames: int = STEP_FRAMES) -> Tagged:
    """Tags a clip of mono audio at 16 kHz, patch by patch.

    Args:
      tagger: from `load`.
      wav_N: float, full scale 1, at least one sample. What is shorter than a patch is repeated up
        to one, as in the network's training.
      step_frames: frames (of 16 ms) from patch to patch; `PATCH_FRAMES` is musicnn's default.
    """
    return tag_patches(tagger, cut_patches(wav_N, step_frames))


def tag_patches(tagger: Tagger, patches_PN: np.ndarray) -> Tagged:
    """Tags patches from `cut_patches`, of one clip or of several."""
    logits, embeddings = [], []
    for first in range(0, len(patches_PN), _BATCH):
        batch_PN = patches_PN[first : first + _BATCH]
        filled_PN = np.pad(batch_PN, ((0, _BATCH - len(batch_PN)), (0, 0)))
        logits_PL, embeddings_PE = _heard(tagger.params, filled_PN)
        logits.append(np.asarray(logits_PL)[: len(batch_PN)])
        embeddings.append(np.asarray(embeddings_PE)[: len(batch_PN)])
    return Tagged(np.concatenate(logits), np.concatenate(embeddings))


def cut_patches(wav_N: np.ndarray, step_frames: int = STEP_FRAMES) -> np.ndarray:
    """The samples [P, PATCH_SAMPLES] under each patch of the clip's spectrogram.

    Frames are centred, with zeros before and after the clip, as librosa has them; what is left at
    the end of less than a patch is dropped, as in musicnn.
    """
    wav_N = np.asarray(wav_N, np.float32)
    if wav_N.ndim != 1 or not wav_N.size:
        raise ValueError(f"wav_N {wav_N.shape}: expected mono audio, [N]")
    shortest = (PATCH_FRAMES - 1) * HOP
    if len(wav_N) < shortest:
        wav_N = np.tile(wav_N, math.ceil(shortest / len(wav_N)))[:shortest]
    padded_N = np.pad(wav_N, FFT_SIZE // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded_N, PATCH_SAMPLES)
    return windows[:: step_frames * HOP]


def _heard(params: Params, patches_PN: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _apply(params, log_mel(params, patches_PN))


@jax.jit
def log_mel(params: Params, patches_PN: jax.Array) -> jax.Array:
    """log10(1 + 10000 x mel power), [P, T, M], of patches from `cut_patches`."""
    window = np.hanning(FFT_SIZE + 1)[:-1].astype(np.float32)  # periodic
    starts_T = np.arange(PATCH_FRAMES) * HOP
    frames_PTW = patches_PN[:, starts_T[:, None] + np.arange(FFT_SIZE)[None]]
    spectrum_PTF = jnp.fft.rfft(frames_PTW * window[None, None])
    power_PTF = jnp.square(spectrum_PTF.real) + jnp.square(spectrum_PTF.imag)
    mel_PTM = jnp.einsum(
        "PTF,FM->PTM", power_PTF, params["spectrogram"]["mel"], precision=_PRECISION
    )
    return jnp.log10(1 + 10_000 * mel_PTM)


@jax.jit
def _apply(params: Params, log_mel_PTM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logits_PL, embeddings_PE). A layer's `scale` and `shift` are its batch norm."""
    x_PTMC = _normed(log_mel_PTM[..., None], params["input"])
    # The front end: shapes of timbre (7 frames of many bands) and of time (one band, many frames),
    # each wherever in frequency it answers most.
    found = []
    for name in ("timbre_38", "timbre_67", "tempo_128", "tempo_64", "tempo_32"):
        length = params[name]["kernel"].shape[0]
        time = ((length - 1) // 2, length // 2)
        found.append(_convolved(x_PTMC, params[name], (time, (0, 0))).max(2))
    x_PTC = jnp.concatenate(found, -1)
    # The middle: densely connected.
    features = [x_PTC]
    for i in range(3):
        y_PTC = _convolved(x_PTC[:, :, None], params[f"middle_{i}"], ((3, 3), (0, 0)))[:, :, 0]
        x_PTC = y_PTC + x_PTC if i else y_PTC
        features.append(x_PTC)
    features_PTC = jnp.concatenate(features, -1)
    pooled_PC2 = jnp.stack([features_PTC.max(1), features_PTC.mean(1)], -1)
    pooled_PC = _normed(pooled_PC2.reshape(len(pooled_PC2), -1), params["pooled"])
    embeddings_PE = _normed(jax.nn.relu(_dense(pooled_PC, params["hidden"])), params["hidden"])
    return _dense(embeddings_PE, params["tags"]), embeddings_PE


def _convolved(x_PTMC: jax.Array, layer: dict[str, jax.Array], padding: Any) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x_PTMC,
        layer["kernel"],
        window_strides=(1, 1),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_PRECISION,
    )
    return _normed(jax.nn.relu(y + _wide(layer["bias"], y)), layer)


def _dense(x_PC: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
    y = jnp.einsum("PC,CE->PE", x_PC, layer["kernel"], precision=_PRECISION)
    return y + _wide(layer["bias"], y)


def _normed(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
    return x * _wide(layer["scale"], x) + _wide(layer["shift"], x)


def _wide(values_C: jax.Array, like: jax.Array) -> jax.Array:
    return values_C.reshape((1,) * (like.ndim - 1) + (-1,))
