"""Files of others, read with a line for whatever is wrong; files and folders, written whole."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from magnet_jax.errors import UserError


def read_object(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file; `hint` says what a missing file is needed for.

    Raises `UserError` if the file is missing, cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; `UserError` if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def put_back(folder: Path) -> None:
    """Undoes half a replacement: a kill may have come between the two renames of `replacing`."""
    old = _beside(folder, "old")
    if not folder.exists() and old.exists():
        old.rename(folder)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the name of `folder` at the end.

    So no half-written folder is ever seen under that name, and one that is replaced is lost at no
    moment. Whether it may be replaced is the caller's to check.

    Raises `UserError` where something cannot be written.
    """
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    try:
        put_back(folder)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk, a folder of someone else's
        raise UserError(f"{folder}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_new_file(option: str, path: Path | None, suffixes: Sequence[str]) -> None:
    """Raises `UserError`, which names the option, for a path that no such file can have."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")


def temporary_name(path: Path) -> Path:
    """A name beside `path` of this writer's own: another process may be writing the same file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def held(path: Path, wait: str | None = None) -> Iterator[bool]:
    """Holds a lock file, which is made and stays, against other processes of this machine.

    Args:
      path: of the lock file.
      wait: to be printed where another process holds it, before waiting; None is not to wait, which
        yields False.
    """
    import fcntl  # which Windows lacks

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                yield False
                return
            print(wait, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, in the same folder, which takes the name `path` at the end.

    Makes the folder. A file that is replaced stays whole until then. Raises `UserError` where
    something cannot be written.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _beside(folder: Path, kind: str) -> Path:
    """Where the new folder ('partial') and the one it replaces ('old') lie meanwhile."""
    return folder.absolute().with_name(f".{folder.absolute().name}.{kind}")
