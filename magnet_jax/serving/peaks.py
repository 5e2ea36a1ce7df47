"""What is drawn of a sound: its least and greatest samples, in a thousand pieces."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

PIECES = 1000


def about(path: Path) -> dict[str, Any]:
    """Seconds, sample rate, channels and peaks of a WAV of ours."""
    with soundfile.SoundFile(path) as file:
        facts = {
            "seconds": round(file.frames / file.samplerate, 6),
            "sample_rate": file.samplerate,
            "channels": file.channels,
        }
        size = -(-file.frames // PIECES)
        low, high = [], []
        for block in file.blocks(size * 64, dtype="float32", always_2d=True):
            mono = block.mean(1)
            for first in range(0, len(mono), size):
                low.append(mono[first : first + size].min())
                high.append(mono[first : first + size].max())
    # Pairs of int8, the least and the greatest of a piece.
    pairs = np.stack([low, high], -1).clip(-1, 1) * 127
    return facts | {"peaks": np.rint(pairs).astype(int).ravel().tolist()}
