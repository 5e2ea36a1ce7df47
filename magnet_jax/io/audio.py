"""Writing audio files: loudness normalisation and WAV, never half a file."""

import io
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import soundfile

from magnet_jax.arguments import Array, Between, Rate, as_name, checked
from magnet_jax.errors import UserError
from magnet_jax.io.files import replacing_file

KNEE = 0.8  # amplitudes above it are bent, so that they stay within full scale
WAV = {"format": "WAV", "subtype": "PCM_16"}
PIECE = 16_384  # samples encoded at once; minutes of them overflow libvorbis's stack


def soft_limit(wav_CN: np.ndarray) -> np.ndarray:
    """Leaves amplitudes up to `KNEE` as they are and bends what is above into full scale."""
    over = np.maximum(np.abs(wav_CN) - KNEE, 0)
    bent = KNEE + (1 - KNEE) * np.tanh(over / (1 - KNEE))
    return np.where(over > 0, np.copysign(bent, wav_CN), wav_CN).astype(np.float32)


def measure_loudness(wav_CN: np.ndarray, sample_rate: int) -> float | None:
    """Integrated loudness in LUFS; None for silence, and for less than 0.4 s."""
    import pyloudnorm  # with SciPy's filters it takes two seconds, which not every command needs

    meter = pyloudnorm.Meter(sample_rate)
    if wav_CN.shape[-1] < meter.block_size * sample_rate:
        return None
    loudness = float(meter.integrated_loudness(wav_CN.T.astype(np.float64)))
    return loudness if np.isfinite(loudness) else None


def normalize_loudness(
    wav_CN: np.ndarray, sample_rate: int, target_lufs: float
) -> tuple[np.ndarray, float | None]:
    """Brings audio to an integrated loudness (ITU-R BS.1770), peaks softly limited.

    Args:
      wav_CN: float32 [channels, samples].
      sample_rate: samples per second.
      target_lufs: wanted loudness, such as -14.

    Returns:
      the audio and the loudness it has, a little below the wanted one where peaks were limited;
      None where there is nothing to measure (silence, or less than the 0.4 s that the standard
      needs), the audio then unscaled.
    """
    before = measure_loudness(wav_CN, sample_rate)
    if before is None:
        return wav_CN, None
    wav_CN = soft_limit(wav_CN * 10 ** ((target_lufs - before) / 20))
    return wav_CN, measure_loudness(wav_CN, sample_rate)


def write_wav(path: Path, wav_CN: np.ndarray, sample_rate: int) -> None:
    """Writes 16-bit PCM, never half a file; samples beyond full scale are cut.

    Raises:
      UserError: the audio holds NaN or infinity, or the file cannot be written.
    """
    write(Path(path), wav_CN, sample_rate, **WAV)


def write(path: Path, wav_CN: np.ndarray, sample_rate: int, **encoding) -> None:
    """Writes audio as libsndfile encodes it, in the way of `write_wav`."""
    content = encoded(path, wav_CN, sample_rate, **encoding)
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)


def encoded(path: Path, wav_CN: np.ndarray, sample_rate: int, **encoding) -> memoryview:
    """The bytes of an audio file; `path` is what errors call it.

    In memory, as libsndfile says of a full disk no more than "System error".

    Raises:
      UserError: the audio holds NaN or infinity, or the format lacks its rate or channels.
    """
    _require_finite(path, wav_CN)
    buffer = io.BytesIO()
    try:
        with soundfile.SoundFile(buffer, "w", sample_rate, len(wav_CN), **encoding) as file:
            for first in range(0, wav_CN.shape[1], PIECE):
                file.write(wav_CN[:, first : first + PIECE].T.clip(-1, 1))
    except soundfile.LibsndfileError as error:
        shape = f"at {sample_rate} Hz in {len(wav_CN)} channel{'s' * (len(wav_CN) > 1)}"
        raise UserError(f"{path}: cannot be written {shape} ({error})") from None
    return buffer.getbuffer()


def _require_finite(path: Path, wav_CN: np.ndarray) -> None:
    if not np.isfinite(wav_CN).all():
        raise UserError(f"{path}: the audio holds NaN or infinite samples; nothing was written")


# Of `audio_write`; the levels are AudioCraft's, -1 and -18 dBFS.
PEAK, RMS = np.float32(10 ** (-1 / 20)), 10 ** (-18 / 20)
SILENCE_RMS = 2e-3  # audio below it has no loudness to bring up
ENCODINGS = {
    "wav": WAV,
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    # The most kbit/s that MP3 has at the sample rate: 320 from 32 kHz on, 160 from 16 kHz on.
    "mp3": {
        "format": "MP3",
        "subtype": "MPEG_LAYER_III",
        "bitrate_mode": "CONSTANT",
        "compression_level": 0.0,
    },
}


@checked
def audio_write(
    stem_name: Annotated[str | Path, as_name],
    wav: Array,
    sample_rate: Rate,
    format: Literal["wav", "mp3", "flac", "ogg"] = "wav",
    normalize: bool = True,
    strategy: Literal["peak", "clip", "rms", "loudness", "none"] = "peak",
    loudness_headroom_db: Annotated[float, Between(-200, 200)] = 14,
    loudness_compressor: bool = False,
    add_suffix: bool = True,
) -> Path:
    """Writes audio to a file, never half of one; names and meanings as in AudioCraft.

    Makes the folder. Says on stderr where samples were cut.

    Args:
      stem_name: path without suffix, or with it where `add_suffix` is False.
      wav: float [C, samples] or [samples].
      sample_rate: samples per second.
      format: 16-bit WAV or FLAC, MP3 at its highest rate, or Ogg Vorbis.
      normalize: without it, 'peak' and 'rms' only turn down what would be too loud.
      strategy: 'peak' brings the peak to -1 dBFS; 'clip' cuts what is above that; 'rms' brings the
        RMS to -18 dBFS; 'loudness' brings the integrated loudness (ITU-R BS.1770) to
        -loudness_headroom_db LUFS, silence and clips shorter than 0.4 s left alone; 'none' leaves
        the level alone.
      loudness_compressor: with 'loudness', bend peaks by tanh instead of cutting them.
      add_suffix: append '.wav' and the like.

    Returns:
      the path written.

    Raises:
      UserError: no such format or strategy, a rate that the format lacks, or no audio: not
        floating-point, empty, NaN or infinite; or the file cannot be written.
    """
    path = Path(f"{stem_name}.{format}" if add_suffix else stem_name)
    wav_CN = _as_channels(path, wav)
    if format == "ogg" and sample_rate > 200_000:  # libvorbis would end the process
        raise UserError(f"{path}: Ogg Vorbis goes up to 200000 Hz, not {sample_rate}")
    if strategy == "clip":
        wav_CN = wav_CN.clip(-PEAK, PEAK)
    elif strategy == "loudness":
        gain = _loudness_gain(path, wav_CN, sample_rate, -loudness_headroom_db)
        wav_CN = wav_CN * np.float32(gain)
        wav_CN = np.tanh(wav_CN) if loudness_compressor and gain != 1 else wav_CN
    elif strategy != "none":
        gain = _level_gain(wav_CN, strategy)
        wav_CN = wav_CN * np.float32(gain if normalize else min(gain, 1))
    if (peak := np.abs(wav_CN).max()) > 1:
        print(f"{path}: peaks of {peak:.2f} are cut to full scale", file=sys.stderr)
    write(path, wav_CN, sample_rate, **ENCODINGS[format])
    return path


def _as_channels(path: Path, wav_CN: np.ndarray) -> np.ndarray:
    # Finite float32 [C, samples].
    floating = np.issubdtype(wav_CN.dtype, np.floating)
    if wav_CN.ndim not in (1, 2) or not wav_CN.size or not floating:
        raise UserError(
            f"{path}: wav must be floating-point [C, samples] or [samples], not {wav_CN.dtype} "
            f"{list(wav_CN.shape)}"
        )
    with np.errstate(over="ignore"):  # becomes infinite, and is refused
        wav_CN = np.atleast_2d(wav_CN).astype(np.float32)
    _require_finite(path, wav_CN)
    return wav_CN


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def _level_gain(wav_CN: np.ndarray, strategy: str) -> float:
    if strategy == "peak":
        return float(PEAK) / max(float(np.abs(wav_CN).max()), 1e-8)
    return RMS / max(_root_mean_square(wav_CN.mean(0, dtype=np.float64)), 1e-8)


def _loudness_gain(path: Path, wav_CN: np.ndarray, sample_rate: int, wanted_lufs: float) -> float:
    if len(wav_CN) > 5:  # the standard weighs five
        raise UserError(
            f"{path}: loudness is measured for at most 5 channels, not {len(wav_CN)}; "
            "choose another strategy"
        )
    quiet = _root_mean_square(wav_CN) < SILENCE_RMS
    loudness = None if quiet else measure_loudness(wav_CN, sample_rate)
    return 1.0 if loudness is None else 10 ** ((wanted_lufs - loudness) / 20)
