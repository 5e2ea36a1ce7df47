"""What a process that is ours alone asks of the C library's memory."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # of glibc's mallopt


def keep_freed() -> None:
    """Lets glibc keep what is freed for the next step, where it would give it back at once.

    Large arrays would else be taken from the kernel anew each time, which clears them page by page:
    up to half of the time of a job that allocates as much at every step. For programs, not for a
    library's callers. Leaves alone what the environment says of malloc, and other C libraries.
    """
    settings = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc." in settings or any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_ARENA_MAX, 1)  # those of threads hold 64 MB at most
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        library.mallopt(_M_TOP_PAD, 64 << 20)
