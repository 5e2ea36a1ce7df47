"""Writing audio files: loudness normalisation and WAV, never half a file."""

from pathlib import Path

import numpy as np
import pyloudnorm
import soundfile

from magnet_jax.errors import UserError

KNEE = 0.8  # amplitudes above it are bent, so that they stay within full scale


def soft_limit(wav_CN: np.ndarray) -> np.ndarray:
    """Leaves amplitudes up to `KNEE` as they are and bends what is above into full scale."""
    over = np.maximum(np.abs(wav_CN) - KNEE, 0)
    bent = KNEE + (1 - KNEE) * np.tanh(over / (1 - KNEE))
    return np.where(over > 0, np.copysign(bent, wav_CN), wav_CN).astype(np.float32)


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

    def measure(wav_CN: np.ndarray) -> float:
        return meter.integrated_loudness(wav_CN.T.astype(np.float64))

    meter = pyloudnorm.Meter(sample_rate)
    if wav_CN.shape[-1] < meter.block_size * sample_rate:
        return wav_CN, None
    before = measure(wav_CN)
    if not np.isfinite(before):
        return wav_CN, None
    wav_CN = soft_limit(wav_CN * 10 ** ((target_lufs - before) / 20))
    return wav_CN, float(measure(wav_CN))


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
