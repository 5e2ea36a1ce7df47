"""Small audio files for the tests of tokenization."""

import json

import numpy as np
import soundfile

RATE = 16000


def tone(seconds, rate=RATE, channels=1, frequency=440.0):
    t = np.arange(round(seconds * rate)) / rate
    wav = 0.3 * np.sin(2 * np.pi * frequency * t) * (1 + np.sin(7 * t)) / 2
    return np.repeat(wav[:, None], channels, axis=1).astype(np.float32)


def put(path, wav, rate=RATE, caption="a tone", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, **how)
    if caption is not None:
        path.with_suffix(".json").write_text(json.dumps({"description": caption, "bpm": 90}))
    return path


def album(folder, count=8, seconds=1.1):
    for i in range(count):
        put(folder / f"{i:02d}.wav", tone(seconds + 0.1 * (i % 3), frequency=200 + 50 * i))
    return folder


def cut_file(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
