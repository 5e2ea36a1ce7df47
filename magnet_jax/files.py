"""Files that others wrote, read with a line for whatever is wrong; folders written whole or not."""

import contextlib
import json
import shutil
from collections.abc import Iterator
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


def _beside(folder: Path, kind: str) -> Path:
    """Where the new folder ('partial') and the one it replaces ('old') lie meanwhile."""
    return folder.absolute().with_name(f".{folder.absolute().name}.{kind}")
