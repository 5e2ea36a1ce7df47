"""Uploaded sound files, read in a process of its own, as tokenization reads them.

`Reader` starts that process: whatever a file does to its libraries, it does it there, with little
memory and for a few seconds. What comes out is a WAV of the same samples, which this project wrote
itself. python -m launch.serve.uploads FD is the process.
"""

import collections
import dataclasses
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from magnet_jax.errors import PassingError, UserError
from magnet_jax.io import exact, formats
from magnet_jax.serving.errors import RequestError
from tokenization.intake import decoder
from tokenization.intake.audio import Facts, RejectedError
from tokenization.track import FileBytes, Part

MEMORY = 2 * 2**30  # bytes of the process
CPU_SECONDS = 30.0  # of one file
SAMPLES = 2 * 48_000  # of all channels, for each second that an upload may have
SECRET = ("MAGNET_JAX_API_KEY",)  # which what decodes a stranger's file is not told
HANGS = 20.0  # seconds without progress after which it is ended
# What becomes of samples that a WAV of floats read from them would not hold as they are.
KEPT = {"PCM_S8": "PCM_16", "PCM_U8": "PCM_16", "PCM_32": "PCM_24", "DOUBLE": "FLOAT"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is asked of an upload."""

    out: str
    max_seconds: float


class Reader:
    """Reads uploads, one after another."""

    def __init__(self):
        self._lock = threading.Lock()
        self._decoder = decoder.Decoder(HANGS, ("-m", "launch.serve.uploads"), SECRET)

    def __call__(self, path: Path, out: Path, max_seconds: float) -> None:
        """Writes the sound of a file as a WAV; `RequestError` where it is none."""
        part = Part(place=FileBytes(path=str(path)))
        try:
            with self._lock:
                wanted = Wanted(out=str(out), max_seconds=max_seconds)
                collections.deque(self._decoder.ask("decode", part, wanted), maxlen=0)
        except RejectedError as error:
            long = error.reason == "too long"
            raise RequestError(
                f"file: {error.reason} ({error.detail})", param="file",
                status=413 if long else 400, code="file_too_long" if long else "invalid_audio",
            ) from None  # fmt: skip
        except PassingError as error:
            raise RequestError(str(error), status=503, code="busy", retry_after=5) from None
        except UserError as error:
            raise RequestError(str(error), status=500, code="decoder_failed") from None

    def close(self) -> None:
        self._decoder.kill()
        self._decoder.close()


# --- the process itself -------------------------------------------------------------------------


def decode(part: Part, wanted: Wanted) -> Iterator[None]:
    """Writes the sound of a file in blocks; returns its `Facts`."""
    path, began = part.place.path, time.process_time()
    with formats.open_sound(path) as sound:
        if sound.loss:
            raise RejectedError("cut off", sound.loss)
        if not 1 <= sound.channels <= 8:
            raise RejectedError("odd channels", f"{sound.channels}; 1 to 8 are read")
        rate = sound.sample_rate
        most = wanted.max_seconds * min(rate, SAMPLES / sound.channels)
        if sound.frames is not None:
            _check_length(sound.frames, most, rate)
        subtype, count = _subtype(path), 0
        nearest = subtype is None
        subtype = subtype or exact.DECODED
        with soundfile.SoundFile(
            wanted.out, "w", rate, sound.channels, subtype=subtype, format="WAV"
        ) as file:
            for block_NC in sound.read(0, None):
                if not np.isfinite(block_NC).all():
                    raise RejectedError("not finite", "holds NaN or infinite samples")
                block_NC = formats.mix(block_NC, sound.channels)
                count += len(block_NC)
                _check_length(count, most, rate)
                if time.process_time() - began > CPU_SECONDS:
                    raise RejectedError("too slow", "takes too long to decode")
                file.write(exact.as_written(block_NC, subtype, nearest=nearest))
                yield None
        if not count:
            raise RejectedError("empty", "no samples")
    seconds = count / rate
    return Facts(format=sound.format, sample_rate=rate, channels=sound.channels, seconds=seconds)


def _check_length(count: int, most: float, rate: int) -> None:
    if count > most:
        seconds = f"{count / rate:.0f} s at least, of {most / rate:g} at most"
        raise RejectedError("too long", seconds)


def _subtype(path: str) -> str | None:
    """What a file's samples are, where it holds them exactly; None of lossy formats."""
    try:
        subtype = soundfile.info(path).subtype
    except soundfile.LibsndfileError:
        return None
    subtype = KEPT.get(subtype, subtype)
    return subtype if subtype in ("PCM_16", "PCM_24", "FLOAT") else None


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    decoder.main(decode)
