"""Decodes as the real process does, but for files whose names say how they kill it."""

import ctypes
import errno
import os
import signal
import time
from pathlib import Path

import numpy as np

from tokenization.intake import audio, decoder


def decode(track, intake):
    if "segfault" in track.path:
        ctypes.string_at(0)
    if "abort" in track.path:
        os.abort()
    if "exit" in track.path:
        os._exit(3)
    if "bug" in track.path:
        raise ZeroDivisionError
    if "memory" in track.path:
        raise MemoryError
    if "outage" in track.path:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    if "greedy" in track.path:
        np.ones(9 * 2**30, np.uint8)
    blocks = audio.decode(track, intake)
    if "late" in track.path:
        yield next(blocks)
    if "once" in track.path:
        tried = Path(f"{track.place.path}.tried")
        if tried.exists():
            return (yield from blocks)
        tried.touch()
    if "sigkill" in track.path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "sigterm" in track.path:
        os.kill(os.getpid(), signal.SIGTERM)
    if "hang" in track.path:
        time.sleep(1e6)
    return (yield from blocks)


decoder.main(decode)
