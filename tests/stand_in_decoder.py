"""Decodes as the real process does, but for files whose names say how they kill it."""

import ctypes
import os
import time

from tokenization import audio, decoder


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
    blocks = audio.decode(track, intake)
    if "late" in track.path:
        yield next(blocks)
    if "hang" in track.path:
        time.sleep(1e6)
    return (yield from blocks)


decoder.main(decode)
