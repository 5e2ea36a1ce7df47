"""Holds a folder, or one of a bucket, for one process; a second one is told who the first is.

FOLDER/.lock says who holds it. The holder gives a sign of life there every few seconds, and removes
it at the end. One that asks on the same machine looks whether the holder's process still runs; any
other waits for a sign of life. So what a dead process or a dead host has left blocks for a minute
at most, whatever the file system knows of locks.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from magnet_jax.errors import PassingError, UserError
from magnet_jax.io import bucket, files

NAME = ".lock"
SIGN = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a holder counts as dead

_tokens: set[str] = set()  # of the locks that this process holds, or asks for


class Seen(NamedTuple):
    """A lock as it was read."""

    content: bytes
    version: int  # another one after each sign of life


class Folder:
    """The lock of a folder on a file system."""

    def __init__(self, folder: Path):
        self._path = folder / NAME

    def read(self) -> Seen | None:
        try:
            with self._path.open("rb") as file:  # (NFS asks its server when a file is opened)
                return Seen(file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    def swap(self, seen: Seen | None, content: bytes | None) -> bool:
        """Writes or removes the lock, if it is still as it was seen; whether it was."""
        with self._one_at_a_time():
            if self.read() != seen:
                return False
            if content is None:
                self._path.unlink()
            elif seen is None:
                try:
                    file = self._path.open("xb")
                except FileExistsError:
                    return False
                try:
                    with file:
                        file.write(content)
                except OSError:  # a full disk
                    self._path.unlink()
                    raise
            else:
                with files.replacing_file(self._path) as temporary:
                    temporary.write_bytes(content)
        return True

    def sign(self, mine: bytes) -> None:
        """A sign of life, which needs no room on the disk."""
        now = self.read()
        if now is not None and now.content == mine:
            os.utime(self._path)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # NFS has no such locks on folders
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


class Bucket:
    """The lock of a folder in a bucket, by the generation of its file."""

    def __init__(self, url: str):
        self._url = url

    def read(self) -> Seen | None:
        found = bucket.read_version(self._url, NAME)
        return None if found is None else Seen(*found)

    def swap(self, seen: Seen | None, content: bytes | None) -> bool:
        return bucket.swap(self._url, NAME, 0 if seen is None else seen.version, content)

    def sign(self, mine: bytes) -> None:
        now = self.read()
        if now is not None and now.content == mine:
            self.swap(now, mine)


def _machine() -> str:
    """What processes that see each other have in common: the kernel that runs, and a namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(process: int) -> str | None:
    """When a process began, as its kernel counts; None where it has ended or cannot be seen."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_there(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process runs; None where that cannot be seen from here."""
    if holder.get("machine") != _machine():
        return None
    process = holder["process"]
    if (started := _started(process)) is not None:
        # This process may have left one in a bucket that was out of reach.
        forgotten = process == os.getpid() and holder.get("token") not in _tokens
        return started == holder["started"] and not forgotten
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, who hides it
        return None
    # Without /proc its number alone is known; with it, the process has ended and is not forgotten.
    return False if holder["started"] else None


def _read(seen: Seen) -> dict[str, Any]:
    try:
        holder = json.loads(seen.content)
        holder["host"], holder["since"], holder["started"]
        range(2**31)[holder["process"]]  # a number that a process can have
        return holder
    except (ValueError, LookupError, TypeError, RecursionError):  # half-written, or another's
        return {"process": "?", "host": "?", "since": "?"}


def myself() -> dict[str, Any]:
    """Who this process is, for others to read."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "started": _started(os.getpid()),
        "machine": _machine(),
    }


def in_words(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']}, since {holder['since']}"


class LostError(UserError):
    """Another process has taken over what this one held."""


class Held:
    """A lock that this process holds."""

    def __init__(self, where: str, lock: Folder | Bucket, mine: bytes):
        self._where, self._lock, self._mine = where, lock, mine
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        while not self._over.wait(SIGN):
            with contextlib.suppress(OSError, UserError):  # out of reach: the next may arrive
                self._lock.sign(self._mine)

    def check(self) -> None:
        """Raises `LostError` where another process has it, which took this one for dead."""
        try:
            now = self._lock.read()
        except PassingError:  # (whoever writes there next will meet the same)
            return
        if now is None or now.content != self._mine:
            other = "was removed" if now is None else f"is that of {in_words(_read(now))}"
            raise LostError(
                f"{self._where}/{NAME} {other}: this process gave no sign of life for more than "
                f"{SILENCE:g} s and writes nothing more there"
            )

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError, UserError):  # it will be found dead
            now = self._lock.read()
            if now is not None and now.content == self._mine:
                self._lock.swap(now, None)


def _is_left(lock: Folder | Bucket, seen: Seen, say: Callable[[str], None], where: str) -> bool:
    """Whether a holder is dead, which may take a minute to know, or has just ended."""
    there = _is_there(_read(seen))
    if there is not None:
        return not there
    say(
        f"{where} is held by {in_words(_read(seen))}, which cannot be seen from here: waiting for "
        f"a sign of life, for {SILENCE:g} s at most"
    )
    until = time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(min(1.0, SIGN))
        if (now := lock.read()) != seen:
            return now is None
    return True


def _take(lock: Folder | Bucket, mine: bytes, say: Callable[[str], None], where: str) -> None:
    for _ in range(3):
        seen = lock.read()
        if seen is not None and not _is_left(lock, seen, say, where):
            raise PassingError(
                f"{where}: another process is at work there, {in_words(_read(seen))}: wait for its "
                "end, or give another --out"
            )
        if lock.swap(seen, mine):
            return
        now = lock.read()
        if now is not None and now.content == mine:  # (a bucket's answer was lost on its way)
            return
    raise PassingError(f"{where}: other processes begin there as well; give each its own --out")


@contextlib.contextmanager
def held(out: str, say: Callable[[str], None]) -> Iterator[Held]:
    """Makes a folder and holds it for this process; what a dead one held is taken over.

    Args:
      out: the folder, or its URL in a bucket.
      say: gets a line where it has to wait, which takes a minute at most.

    Raises:
      PassingError: another process has it.
    """
    folder = None if bucket.is_url(out) else Path(out)
    lock = Bucket(out) if folder is None else Folder(folder)
    new = folder is not None and not folder.exists()
    if new:
        folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    mine = json.dumps(myself() | {"token": token}).encode()
    # First of all: a lock of this process whose token is unknown counts as forgotten.
    _tokens.add(token)
    try:
        _take(lock, mine, say, out)
        hold = Held(out, lock, mine)
        try:
            yield hold
        finally:
            hold.release()
    finally:
        _tokens.discard(token)
        if new:
            with contextlib.suppress(OSError):  # not empty, as a rule
                folder.rmdir()
