"""Files of a server: uploads and results, by id, for a time.

FOLDER/files/ID/ holds an upload: audio.wav and about.json. FOLDER/jobs/ID/ holds what a job made:
INDEX.wav with INDEX.tokens.npz and INDEX.json beside it, and job.json. Several processes may share
a folder: each finds what the others made.
"""

import contextlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from magnet_jax.errors import UserError
from magnet_jax.io.files import replacing_file
from magnet_jax.serving.errors import RequestError

log = logging.getLogger(__name__)
ID = re.compile(r"[a-z2-7]{26}")


class Store:
    """Files for a time, up to an amount."""

    def __init__(self, folder: Path, *, keep_seconds: float, keep_bytes: float):
        self.folder, self.keep_seconds, self.keep_bytes = folder, keep_seconds, keep_bytes
        self._lock = threading.Lock()
        self._held: dict[Path, int] = {}  # folders in use, which do not expire
        for name in ("files", "jobs", "coming"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def job(self, job_id: str) -> Path:
        """The folder of a job; there or not."""
        return self._of("jobs", job_id)

    def clip(self, job_id: str, index: int) -> Path:
        """The WAV of a job's clip; there or not."""
        return self.job(job_id) / f"{index}.wav"

    def upload(self, file_id: str) -> Path:
        """The folder of an upload; there or not."""
        return self._of("files", file_id)

    def _of(self, kind: str, name: str) -> Path:
        if not ID.fullmatch(name):  # never a path
            raise RequestError(f"{name[:40]!r} is no id", status=404, code="not_found")
        return self.folder / kind / name

    @property
    def coming(self) -> Path:
        """Where files are written that are not whole yet."""
        return self.folder / "coming"

    def about(self, file_id: str, owner: str) -> dict[str, Any]:
        """What is known of an upload; `RequestError` 404 where it is gone, or is another's."""
        try:
            about = json.loads((self.upload(file_id) / "about.json").read_text("utf-8"))
        except (OSError, ValueError):
            about = None
        if about is None or about["owner"] != owner:
            raise RequestError(
                f"no file {file_id}: it was never there, or has expired",
                status=404, code="not_found", param="file",
            )  # fmt: skip
        return about

    def record(self, job_id: str) -> dict[str, Any] | None:
        """The job.json of a job that is done; None where there is none."""
        try:
            return json.loads((self.job(job_id) / "job.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def records(self, but: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Those of all jobs, but for some."""
        for path in (self.folder / "jobs").iterdir():
            if ID.fullmatch(path.name) and path.name not in but:
                record = self.record(path.name)
                if record is not None:
                    yield record

    def remove(self, path: Path) -> None:
        _remove(path)

    def hold(self, *paths: Path) -> None:
        """Keeps folders from expiring until they are released as often."""
        with self._lock:
            for path in paths:
                self._held[path] = self._held.get(path, 0) + 1

    def release(self, *paths: Path) -> None:
        with self._lock:
            for path in paths:
                self._held[path] -= 1
                if not self._held[path]:
                    del self._held[path]

    def expire(self) -> None:
        """Removes what is too old, and the oldest while there is too much."""
        folders = []
        for kind in ("files", "jobs"):
            for path in (self.folder / kind).iterdir():
                with contextlib.suppress(OSError):  # gone meanwhile, or no folder of ours
                    size = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
                    folders.append((path.stat().st_mtime, size, path))
        for path in self.coming.iterdir():  # of a process that was killed
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > self.keep_seconds:
                    _remove(path)
        total, now = sum(size for _, size, _ in folders), time.time()
        for changed, size, path in sorted(folders):
            if now - changed <= self.keep_seconds and total <= self.keep_bytes:
                break
            going = self.coming / f"{path.name}.expired"
            with self._lock, contextlib.suppress(OSError):  # another process was sooner
                if path in self._held:
                    continue
                path.rename(going)
            _remove(going)  # which may take long
            total -= size

    def size(self) -> int:
        """Bytes of all files."""
        total = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # which expired meanwhile
                total += path.stat().st_size if path.is_file() else 0
        return total


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write(path: Path, content: bytes | memoryview | str) -> None:
    """Writes a file, never half of it; `RequestError` 507 where the disk is full."""
    with written(), replacing_file(path) as file:
        if isinstance(content, str):
            file.write_text(content, encoding="utf-8")
        else:
            file.write_bytes(content)


@contextlib.contextmanager
def written() -> Iterator[None]:
    """Makes a `RequestError` of whatever keeps a file from being written meanwhile."""
    try:
        yield
    except RequestError:
        raise
    except (UserError, OSError) as error:
        log.error("%s", error)  # which names a path of the server, and is not for clients
        raise RequestError(
            "the server cannot write to its disk, which may be full: try later",
            status=507, code="storage_full", retry_after=60,
        ) from None  # fmt: skip
