"""Files of others, read with a line for whatever is wrong; files and folders, written whole."""

import contextlib
import json
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy then reads bfloat16)
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
    """The tensors of a safetensors file, see `finite`; `UserError` if it is missing or damaged."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # KeyError: a type that NumPy lacks
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged, not readable as weights ({error})") from None
    return finite(path, tensors)


class RoundedWarning(UserWarning):
    """Numbers of float64 were rounded as they were read."""


def finite(where: Path | str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a file or of a model, of which every number can be computed with.

    All computing is in float32. bfloat16 is widened to it, which is exact. float64 is rounded to
    it, and a `RoundedWarning` names the tensors that changed. float16 and integers stay as they
    are.

    Raises `UserError` that names a tensor with NaN, infinity, or a number beyond float32.
    """
    found, rounded = {}, []
    for name, array in tensors.items():
        found[name] = array
        if array.dtype.name == "bfloat16":
            found[name] = array.astype(np.float32)
        elif np.issubdtype(array.dtype, np.floating) and array.dtype.itemsize > 4:
            with np.errstate(over="ignore"):
                found[name] = array.astype(np.float32)
            if not np.array_equal(found[name], array):
                rounded.append(name)
        elif not np.issubdtype(array.dtype, np.floating):
            continue
        if not _is_finite(found[name]):
            bad = float(array[~np.isfinite(found[name])].flat[0])
            what = "NaN" if np.isnan(bad) else "infinity" if np.isinf(bad) else f"{bad:g}"
            raise UserError(
                f"{where}: the tensor {name} holds {what}, which is no float32 number: the weights "
                "are damaged, or their training diverged; take another copy or checkpoint"
            )
    if rounded:
        warnings.warn(
            f"{where}: {len(rounded)} float64 tensor{'s' * (len(rounded) > 1)} rounded to float32: "
            f"{few(rounded)}",
            RoundedWarning,
            stacklevel=2,
        )
    return found


def _is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are; much quicker than `np.isfinite(array).all()`."""
    if array.dtype == np.float16:
        return not array.size or int((array.view(np.uint16) & 0x7FFF).max()) < 0x7C00
    with np.errstate(over="ignore", invalid="ignore"):
        # NaN and infinity stay in a sum, which may also overflow by itself.
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


@contextlib.contextmanager
def noting_rounded() -> Iterator[list[str]]:
    """Collects what was rounded meanwhile, each `RoundedWarning` once, in place of showing it."""
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", RoundedWarning)
        shown = warnings.showwarning

        def show(message, category, *rest, **keywords):
            if not issubclass(category, RoundedWarning):
                shown(message, category, *rest, **keywords)
            elif str(message) not in notes:
                notes.append(str(message))

        warnings.showwarning = show
        yield notes


def few(names: Sequence[str], count: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


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
