"""A codec with a tonal stream before its own codebooks, which tells sines apart."""

from pathlib import Path

import numpy as np

from magnet_jax.codec import encodec, tonal

PITCHES_HZ = 220 * 2 ** (np.arange(24) / 12)
SPECTRUM = tonal.Spectrum()


def sine(hertz, samples=16000, phase=0.0, amplitude=0.1, rate=16000):
    wave = np.sin(2 * np.pi * hertz * np.arange(samples) / rate + phase)
    return (amplitude * wave).astype(np.float32)


def put_tonal(folder: Path, source: str = "embedded", spectrum: tonal.Spectrum = SPECTRUM) -> str:
    """Entry 0 is silence, entry n + 1 a sine of PITCHES_HZ[n]."""
    wav_BN = np.stack([np.zeros(16000), *(sine(hertz) for hertz in PITCHES_HZ)])
    heard_BTM = tonal.levels(wav_BN, spectrum, 16000, 320)
    folder.mkdir(parents=True)
    stream = tonal.Tonal(spectrum, heard_BTM[:, 25].astype(np.float32))
    encodec.write_tonal(encodec.read_base(source), stream, folder)
    return str(folder)
