"""Writing audio files: loudness normalisation and WAV, never half a file."""

from pathlib import Path

import numpy as np
import pyloudnorm
import soundfile

from magnet_jax.errors import UserError

PEAK = 10 ** (-1 / 20)  # full scale less 1 dB


def normalize_loudness(
    wav_CN: np.ndarray, sample_rate: int, target_lufs: float
) -> tuple[np.ndarray, float | None]:
    """Scales audio to an integrated loudness (ITU-R BS.1770), or less where peaks forbid it.

    Args:
      wav_CN: float32 [channels, samples].
      sample_rate: samples per second.
      target_lufs: wanted loudness, such as -14.

    Returns:
      the audio, its peak at -1 dBFS at most, and the loudness reached: None where there is nothing
      to measure (silence, or less than the 0.4 s that the standard needs), the audio then unscaled.
    """
    if wav_CN.shape[-1] < 0.4 * sample_rate:
        return wav_CN, None
    loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(wav_CN.T.astype(np.float64))
    if not np.isfinite(loudness):
        return wav_CN, None
    gain_db = target_lufs - loudness
    gain = min(10 ** (gain_db / 20), PEAK / max(np.abs(wav_CN).max(), 1e-9))
    return (gain * wav_CN).astype(np.float32), float(loudness + 20 * np.log10(gain))


def write_wav(path: Path, wav_CN: np.ndarray, sample_rate: int) -> None:
    """Writes 16-bit PCM under a temporary name and renames it; samples beyond full scale are cut.

    Raises:
      UserError: the audio holds NaN or infinity.
    """
    if not np.isfinite(wav_CN).all():
        raise UserError(f"{path}: the audio holds NaN or infinite samples; nothing was written")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    soundfile.write(temporary, wav_CN.T.clip(-1, 1), sample_rate, format="WAV", subtype="PCM_16")
    temporary.replace(path)
