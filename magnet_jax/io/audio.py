"""Writing audio files: loudness normalisation and WAV, never half a file."""

import io
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import soundfile

from magnet_jax.arguments import Between, as_array, as_name, as_rate, checked
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


# Below this RMS audio counts as silence, whose loudness is left alone.
SILENCE_RMS = 2e-3


_Kilobits = Annotated[int, Between(1, 2**31 - 1, words="be a positive whole number")]
_Decibels = Annotated[float, Between(-200, 200)]


@checked
def audio_write(
    stem_name: Annotated[str | Path, as_name],
    wav: Annotated[np.ndarray, as_array],
    sample_rate: Annotated[int, as_rate],
    format: Literal["wav", "mp3", "flac", "ogg"] = "wav",
    mp3_rate: _Kilobits = 320,
    normalize: bool = True,
    strategy: Literal["peak", "clip", "rms", "loudness", "none"] = "peak",
    peak_clip_headroom_db: _Decibels = 1,
    rms_headroom_db: _Decibels = 18,
    loudness_headroom_db: _Decibels = 14,
    loudness_compressor: bool = False,
    log_clipping: bool = True,
    make_parent_dir: bool = True,
    add_suffix: bool = True,
) -> Path:
    """Writes audio to a file, never half of one; names and meanings as in AudioCraft.

    Args:
      stem_name: path without suffix, or with it where `add_suffix` is False.
      wav: float [C, samples] or [samples].
      sample_rate: samples per second.
      format: 16-bit WAV or FLAC, MP3 at `mp3_rate` kbit/s, or Ogg Vorbis.
      mp3_rate: kbit/s, brought within what MP3 has at that sample rate: 32 to 320 from 32 kHz on,
        8 to 160 from 16 kHz on, 8 to 64 below.
      normalize: without it, 'peak' and 'rms' only turn down what would be too loud.
      strategy: 'peak' brings the peak to -peak_clip_headroom_db dBFS; 'clip' cuts what is above
        that; 'rms' brings the RMS to -rms_headroom_db dBFS; 'loudness' brings the integrated
        loudness (ITU-R BS.1770) to -loudness_headroom_db LUFS, silence and clips shorter than
        0.4 s left alone; 'none' leaves the level alone.
      loudness_compressor: with 'loudness', bend peaks by tanh instead of cutting them.
      log_clipping: say on stderr where samples were cut.
      make_parent_dir, add_suffix: make the folder; append '.wav' and the like.

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
    if strategy == "loudness" and len(wav_CN) > 5:  # the standard weighs five
        raise UserError(
            f"{path}: loudness is measured for at most 5 channels, not {len(wav_CN)}; "
            "choose another strategy"
        )
    limit = np.float32(10 ** (-peak_clip_headroom_db / 20))
    if strategy == "clip":
        wav_CN = wav_CN.clip(-limit, limit)
    elif strategy == "loudness":
        gain = _loudness_gain(wav_CN, sample_rate, -loudness_headroom_db)
        wav_CN = wav_CN * np.float32(gain)
        wav_CN = np.tanh(wav_CN) if loudness_compressor and gain != 1 else wav_CN
    elif strategy != "none":
        level, wanted = float(np.abs(wav_CN).max()), float(limit)
        if strategy == "rms":  # of the mono mix
            level = float(np.sqrt(np.square(wav_CN.mean(0, dtype=np.float64)).mean()))
            wanted = 10 ** (-rms_headroom_db / 20)
        gain = wanted / max(level, 1e-8)
        wav_CN = wav_CN * np.float32(gain if normalize else min(gain, 1))
    if log_clipping and (peak := np.abs(wav_CN).max()) > 1:
        print(f"{path}: peaks of {peak:.2f} are cut to full scale", file=sys.stderr)
    if not make_parent_dir and not path.parent.is_dir():
        raise UserError(f"{path}: no such folder; make it, or leave make_parent_dir on")
    write(path, wav_CN, sample_rate, **_encoding(format, sample_rate, mp3_rate))
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


def _loudness_gain(wav_CN: np.ndarray, sample_rate: int, wanted_lufs: float) -> float:
    rms = float(np.sqrt(np.square(wav_CN, dtype=np.float64).mean()))
    loudness = measure_loudness(wav_CN, sample_rate) if rms >= SILENCE_RMS else None
    return 1.0 if loudness is None else 10 ** ((wanted_lufs - loudness) / 20)


def _encoding(format: str, sample_rate: int, mp3_rate: int) -> dict[str, object]:
    if format == "mp3":
        return _mp3_encoding(sample_rate, mp3_rate)
    return {"format": format.upper(), "subtype": "VORBIS" if format == "ogg" else "PCM_16"}


def _mp3_encoding(sample_rate: int, kbps: int) -> dict[str, object]:
    # libsndfile takes a share of the way from a rate's highest to its lowest number of kbit/s.
    highest, lowest = (320, 32) if sample_rate >= 32_000 else (160, 8)
    if sample_rate < 16_000:
        highest = 64
    share = (highest - min(max(kbps, lowest), highest)) / (highest - lowest)
    return {
        "format": "MP3",
        "subtype": "MPEG_LAYER_III",
        "bitrate_mode": "CONSTANT",
        "compression_level": min(share, 0.999),
    }
