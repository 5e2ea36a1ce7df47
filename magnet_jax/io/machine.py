"""What this process may use of its machine, and what it has used, on Linux and macOS."""

import ctypes
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # of glibc's mallopt
_SETTINGS = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad", "arena_max")


def num_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process may use: those that it is bound to, within its container's quota.

    At least 1; a part of a CPU counts as one. root: of the file system.
    """
    return max(1, min([_num_bound(), *map(math.ceil, _quotas(root))]))


def keep_to_quota() -> None:
    """Makes libraries that are loaded from now on start no more threads than `num_cpus`.

    They count the CPUs that they see, and know nothing of a container's quota: dozens of threads
    would then share the time of a few CPUs. For programs, to be called first of all. Does nothing
    where the environment says how many threads there are.
    """
    count = num_cpus()
    if count < _num_bound():
        os.environ.setdefault("OMP_NUM_THREADS", str(count))


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


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The most memory that a process has held, by `resource.getrusage` or `os.wait4`."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB


def _num_bound() -> int:
    if hasattr(os, "sched_getaffinity"):  # macOS binds no process to CPUs
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """The CPUs that each control group of this process grants, where it sets a limit (Linux)."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:  # NUMBER:CONTROLLERS:GROUP, and no controllers in version 2
        _, controllers, group = line.split(":", 2)
        if not controllers:
            for folder in _folders(mounted, group):
                yield from _quota(_words(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            # Not every system mounts it under the name that it has here.
            for mount in {controllers, "cpu", "cpu,cpuacct"}:
                for folder in _folders(mounted / mount, group):
                    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    yield from _quota([word for name in names for word in _words(folder / name)])


def _folders(mounted: Path, group: str) -> list[Path]:
    """Those of a group and of the groups that it is in.

    What is mounted in a container is often its own group alone, while the path is the host's.
    """
    path = PurePosixPath(group.lstrip("/"))
    return [mounted / part for part in (path, *path.parents) if ".." not in part.parts]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _quota(words: list[str]) -> Iterator[float]:
    """CPUs, of microseconds in each period and the period; "max" or -1 is no limit."""
    if len(words) == 2 and all(word.isdecimal() for word in words) and float(words[1]) > 0:
        yield float(words[0]) / float(words[1])
