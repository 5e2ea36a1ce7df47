"""Helpers of the tokenization tests: reading a track, a decoder in-thread, a codec without cost."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from magnet_jax.codec.encodec import load_codec, read_spec
from magnet_jax.errors import UserError
from tokenization.intake import decoder as decoding

load_once = functools.cache(load_codec)


def read_audio(track, intake, decoder):
    """A whole track, or part, [C, N] (float32), and its facts."""
    stream = decoding.open_audio(getattr(track, "part", track), intake, decoder)
    return np.ascontiguousarray(np.concatenate(list(stream), axis=1)), stream.facts


def measure(track, intake, decoder):
    return decoding.measure(track.part, intake, decoder)


def read_header(track, intake, decoder):
    return decoding.read_header(track.part, intake, decoder)


class InlineDecoder(decoding.Decoder):
    """Answers in the thread that asks, as the process would."""

    def ask(self, kind, *arguments):
        for what, value in decoding.answers(kind, *arguments):
            yield decoding.told(what, value)


def stub_codec(source, device="cpu", num_codebooks=None):
    """A codec whose tokens are a function of the sound of their frame.

    With BREAK_CODEC=1 it raises a `UserError`; CODEC_SECONDS is what a call takes.
    """
    spec = read_spec(source, num_codebooks)
    hop = round(spec.sample_rate / spec.frame_rate)

    def encode(wav_BCN):
        if os.environ.get("BREAK_CODEC"):
            raise UserError("the codec is broken")
        time.sleep(float(os.environ.get("CODEC_SECONDS", "0")))
        level_BT = np.abs(wav_BCN[:, 0].reshape(len(wav_BCN), -1, hop)).sum(axis=2)
        codes_BT = (1000 * level_BT).astype(np.int64)
        codes = [(codes_BT + 7 * k) % spec.codebook_size for k in range(spec.num_codebooks)]
        return np.stack(codes, axis=1).astype(np.int16)

    return SimpleNamespace(
        spec=spec, hop=hop, encode=encode, config=SimpleNamespace(norms_over_clip=True)
    )


def start(kind, *arguments, **environ):
    """A run of tokenization.job or .beam in a process of its own, with that codec."""
    program = Path(__file__).with_name("stand_in_job.py")
    return subprocess.Popen(
        [sys.executable, program, kind, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
    )


def finish(kind, *arguments):
    """Waits for such a run, and returns what it printed."""
    process = start(kind, *arguments)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr[-3000:]
    return stdout
