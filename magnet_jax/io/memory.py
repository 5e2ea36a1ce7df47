"""What a process that is ours alone asks of the C library's memory."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # of glibc's mallopt
_SETTINGS = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad", "arena_max")


def keep_freed() -> None:
    """Lets glibc keep what is freed for the next step, where it would give it back at once.

    Large arrays would else be taken from the kernel anew each time, which clears them page by page:
    up to half of the time of a job that allocates as much at every step. For programs, not for a
    library's callers. Does nothing where the environment says how to keep memory, or under
    another C library.
    """
    settings = os.environ.get("GLIBC_TUNABLES", "")
    said = any(name in settings for name in _SETTINGS) or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if said or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_ARENA_MAX, 1)  # those of threads hold 64 MB at most
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        library.mallopt(_M_TOP_PAD, 64 << 20)
