"""What all kinds of sources share: paths that stay inside, what tells files apart, tasks.

There may be millions of paths: they are strings, which take a fraction of the time and memory.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import stat
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from magnet_jax.errors import UserError
from tokenization.intake.audio import RejectedError, is_outage
from tokenization.source.settings import Source
from tokenization.track import Track

# Where paths are looked for unless the user names the place.
PATH_NAMES = ("path", "file_name", "filename", "file", "audio")


@dataclass(frozen=True, slots=True)
class Ends:
    """What tells one file from another without reading it."""

    size: int
    digest: bytes
    """Of the size and both ends."""
    whole: bool
    """Whether the two ends are all there is."""


# A track with what tells its audio from others', where that is cheap to know. Called in threads.
Make = Callable[[], tuple[Track, Ends | None]]
Task = tuple[str, Make]  # with the path, for rejects


class IgnoredError(Exception):
    """Raised by a task whose file is no track, and nobody's mistake."""


def refuse(reason: str, detail: str) -> Make:
    def make() -> tuple[Track, Ends | None]:
        raise RejectedError(reason, detail)

    return make


def refuse_metadata(source: Source, path: Path) -> None:
    """Raises `UserError` for --metadata about a source that has its captions within."""
    if source.metadata is not None:
        raise UserError(
            f"--metadata {source.metadata}: for a folder of audio or a manifest; {path} has its "
            "captions within"
        )


def split(name: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower()


class Root:
    """A folder that nothing is read outside of."""

    def __init__(self, folder: Path):
        self.given = os.path.abspath(folder)
        self.real = os.path.realpath(folder)
        self._folders: dict[str, str] = {}  # resolving each path in full would take long

    def resolve(self, path: str) -> str:
        """The real path of what `path` names, relative to the folder unless it is absolute.

        Raises `RejectedError` if that is outside, or no name that records can hold.
        """
        check_name(path)
        above, name = os.path.split(os.path.join(self.real, path))
        if above not in self._folders:
            self._folders[above] = os.path.realpath(above)
        real = os.path.join(self._folders[above], name)
        if os.path.islink(real):
            real = os.path.realpath(real)
        if name == ".." or not is_below(real, self.real):
            up = os.path.isabs(path) or ".." in path.split("/")
            detail = "not below it; --root can name another" if up else "a link out of the folder"
            raise RejectedError("outside the folder", detail)
        return real

    def relative(self, path: str) -> str:
        """The path below the folder, by name, of a path that may be absolute."""
        whole = os.path.normpath(os.path.join(self.given, path))
        for root in (self.given, self.real):
            if is_below(whole, root):
                return os.path.relpath(whole, root)
        return os.path.relpath(self.resolve(path), self.real)

    def find(self, path: str) -> tuple[str, str, Ends]:
        """The real path of the file that a table names, its path below the folder, and its ends."""
        for spelled in _spellings(path):
            try:
                real = self.resolve(spelled)
                return real, self.relative(spelled), file_ends(real)
            except FileNotFoundError:
                continue
        raise RejectedError("missing", "no such file")


def _spellings(path: str) -> Iterator[str]:
    """A path as it is, then as it may be meant: tables are made on other systems too."""
    yield path
    plain = path.strip().removeprefix("file://").replace("\\", "/")
    others = (
        unicodedata.normalize(form, one)
        for one in (plain, urllib.parse.unquote(plain, errors="surrogateescape"))
        for form in ("NFC", "NFD")
    )
    yield from dict.fromkeys(other for other in (plain, *others) if other != path)


def is_hidden(path: str) -> bool:
    """Whether a name in a path begins with a dot, or is the folder of macOS's archives for such."""
    names = (name for name in path.split("/") if name not in (".", ".."))
    return any(name.startswith(".") or name == "__MACOSX" for name in names)


def is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def check_below(root: Path, paths: Iterable[Path]) -> None:
    """Raises `UserError` if one of several files that make up a source is a link out of `root`."""
    real = os.path.realpath(root)
    for path in paths:
        if not is_below(os.path.realpath(path), real):
            raise UserError(f"{path}: leads out of {root}; --root can name a folder above both")


def printable(path: str) -> str:
    """A path in valid UTF-8."""
    return path.encode(errors="backslashreplace").decode()


def check_name(path: str) -> None:
    if printable(path) != path:
        raise RejectedError("bad name", "the file name is not UTF-8")
    if "\0" in path:
        raise RejectedError("bad name", "no file can have this name")


def file_ends(path: str) -> Ends:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise RejectedError("unreadable", "not a regular file")
    if status.st_size == 0:  # and a copy of no other
        raise RejectedError("empty", "a file of 0 bytes")
    return range_ends(path, 0, status.st_size)


def range_ends(path: str, offset: int, size: int) -> Ends:
    handle = os.open(path, os.O_RDONLY)
    try:
        return _ends(size, lambda at, count: os.pread(handle, count, offset + at))
    finally:
        os.close(handle)


def _ends(size: int, read: Callable[[int, int], bytes]) -> Ends:
    """read(position, bytes)."""
    # At most a thirtieth of a file is read, or a block of the disk.
    sampled = max(2**12, min(2**16, size // 64))
    digest = hashlib.sha256(f"{size}\n".encode())
    digest.update(read(0, min(size, sampled)))
    if size > sampled:
        begin = max(sampled, size - sampled)
        digest.update(read(begin, size - begin))
    return Ends(size=size, digest=digest.digest(), whole=size <= 2 * sampled)


def buffer_ends(buffer: Any) -> Ends:
    view = memoryview(buffer)
    return _ends(len(view), lambda at, count: view[at : at + count])


def open_regular(path: str) -> BinaryIO:
    """Raises OSError, also for a pipe, whose opening would wait for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return open(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, "not a regular file", path)


@contextlib.contextmanager
def open_listing(path: Path) -> Iterator[Any]:
    """The bytes of a table, manifest or tar, unpacked if its name says .gz.

    Raises `UserError` if it cannot be opened.
    """
    try:
        file = open_regular(os.fspath(path))
    except OSError as error:
        if is_outage(error):
            raise
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    is_packed = path.name.lower().endswith(".gz")
    with file, gzip.open(file) if is_packed else contextlib.nullcontext(file) as content:
        yield content


def same_name(first: str) -> str:
    return f"{printable(first)} goes by the same name, and may be other audio; rename one"
