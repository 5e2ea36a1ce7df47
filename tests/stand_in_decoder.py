"""Decodes as the real process does, but for files whose names say how they kill it."""

import ctypes
import errno
import os
import signal
import time
from pathlib import Path

import numpy as np

from tokenization.intake import decoder


def decode(part, intake):
    name = Path(part.paths[0]).name
    if "segfault" in name:
        ctypes.string_at(0)
    if "abort" in name:
        os.abort()
    if "exit" in name:
        os._exit(3)
    if "bug" in name:
        raise ZeroDivisionError
    if "memory" in name:
        raise MemoryError
    if "outage" in name:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    if "greedy" in name:
        np.ones(9 * 2**30, np.uint8)
    blocks = decoder.decode(part, intake)
    if "late" in name:
        yield next(blocks)
    if "once" in name:
        tried = Path(f"{part.paths[0]}.tried")
        if tried.exists():
            return (yield from blocks)
        tried.touch()
    if "sigkill" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "sigterm" in name:
        os.kill(os.getpid(), signal.SIGTERM)
    if "hang" in name:
        time.sleep(1e6)
    return (yield from blocks)


decoder.main(decode)
