"""Files of others, read with a line for whatever is wrong; files and folders, written whole."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy then reads bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """The wanted tensors of a safetensors file, see `finite`.

    Raises `UserError` if it is missing or damaged, or holds numbers that are not finite.
    """
    try:
        with safe_open(path, framework="numpy") as reader:
            tensors = {name: reader.get_tensor(name) for name in filter(wanted, reader.keys())}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # TypeError: NumPy lacks a type, such as float8
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = unlike_weights(path) or error
        raise UserError(f"{path}: damaged, not readable as weights ({reason})") from None
    return finite(path, tensors)


def unlike_weights(path: Path) -> str:
    """What a file that is not read as weights is, and how to mend it; '' where that is unknown."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError:
        return ""
    safe = path.suffix == ".safetensors"
    if not size:
        return "it is empty: copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "it is a pointer of Git LFS, not the weights themselves: run `git lfs pull` in its "
            "repository, or download the file"
        )
    if head.lstrip()[:1] == b"<":
        return "it is a web page, not weights: download the file itself"
    if head[:2] == b"PK":
        if safe:
            return "it is a file of torch.save: its name must end in .bin, not .safetensors"
        return "" if zipfile.is_zipfile(path) else "it is cut off: copy or download it again"
    if head[8:9] == b"{":
        if not safe:
            return "it is a safetensors file: its name must end in .safetensors"
        return "it is cut off: copy or download it again" if _is_cut_off(path, size) else ""
    if all(byte in b"\t\n\r" or byte >= 32 for byte in head) and head.isascii():
        return "it is a text, not weights: download the file itself"
    return ""


def _is_cut_off(path: Path, size: int) -> bool:
    """Whether a safetensors file promises more than it holds."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            return True
        try:
            header = json.loads(file.read(start - 8))
            ends = [entry["data_offsets"][1] for entry in header.values() if "dtype" in entry]
            return start + max(ends, default=0) > size
        except (ValueError, AttributeError, TypeError, LookupError):
            return False


_WEIGHTS_SUFFIXES = (".bin", ".ckpt", ".gguf", ".msgpack", ".npz", ".onnx", ".pt", ".pth",
                     ".safetensors", ".th")  # fmt: skip


def weights_beside(folder: Path) -> str:
    """A remark on the weights that lie in a folder under names that nobody asks for."""
    with contextlib.suppress(OSError):
        names = sorted(path.name for path in folder.iterdir())
        if found := [n for n in names if any(f"{s}." in f"{n}." for s in _WEIGHTS_SUFFIXES)]:
            return f"; it holds {few(found)}, which are not read under these names"
    return ""


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
    old = _old(folder)
    if folder.exists() or not old.exists():
        return
    with _alone_in(old.parent):  # nobody is between the two just now
        if not folder.exists() and old.exists():
            old.rename(folder)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the name of `folder` at the end.

    So no half-written folder is ever seen under that name, and one that is replaced is lost at no
    moment. Of several writers each fills a folder of its own, and the last one to end stays.
    Whether `folder` may be replaced is the caller's to check.

    Raises `UserError` where something cannot be written.
    """
    with not_half_written(folder):
        put_back(folder)
        folder = folder.resolve()  # what a link points to is replaced, not the link
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(folder.parent)
        partial, handle = _made_and_locked(_beside(folder, "partial"), Path.mkdir)
        try:
            yield partial
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)


def _publish(partial: Path, folder: Path) -> None:
    """Gives a folder the name of `folder`, which is moved out of the way before."""
    old = _old(folder)
    with _alone_in(partial.parent):
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def not_half_written(path: Path) -> Iterator[None]:
    """Makes a `UserError`, which names `path`, of whatever keeps it from being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        named = getattr(error, "filename", None)
        if named and not any(is_left_over(part) for part in Path(named).parts):
            reason = f"{named}: {reason}" if str(named) != str(path) else reason
        raise UserError(f"{path}: cannot be written ({reason}){how_to_make_room(error)}") from None


def how_to_make_room(error: Exception) -> str:
    """What to add to a message on a disk that is full; '' for other errors.

    Libraries in other languages tell of the number in words alone.
    """
    advice = {
        errno.ENOSPC: "make room on that disk, or name a folder on another",
        errno.EDQUOT: "your quota is used up: make room, or name a folder on another disk",
        errno.EFBIG: "no file may be as large there: see `ulimit -f`, or name another folder",
    }
    for number, text in advice.items():
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return f"; {text}"
    return ""


PICTURES = (".png", ".pdf", ".svg")


def check_new_file(option: str, path: Path | None, suffixes: Sequence[str]) -> None:
    """Raises `UserError`, which names the option, for a path that no such file can have."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")


def check_new_folder(option: str, path: Path) -> None:
    """Raises `UserError`, which names the option, unless a folder is new or empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{option} {path}: is there already; name a new folder")


def make_folder(option: str, path: Path) -> None:
    """Makes a folder in which files will be written, before the work that goes into them.

    Raises `UserError`, which names the option, where it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be made ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: may not be written to; name another folder")


def check_holds_only(folder: Path, names: Collection[str]) -> None:
    """Raises `UserError` for a folder that is to be replaced, and holds more than what is made."""
    if others := sorted({path.name for path in folder.iterdir()} - set(names)):
        raise UserError(
            f"{folder}: holds other files as well ({others[0]}), which would be lost; move them, "
            "or give another --out"
        )


@contextlib.contextmanager
def held(path: Path, wait: str | None = None) -> Iterator[bool]:
    """Holds a lock file, which is made and stays, against other processes of this machine.

    Args:
      path: of the lock file.
      wait: to be printed where another process holds it, before waiting; None is not to wait, which
        yields False.
    """
    with not_half_written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("w")
    with opened as file:
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
    with not_half_written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device or a pipe, which is to stay
            yield path
            return
        with temporary(path) as writing:
            yield writing
            writing.replace(path)


@contextlib.contextmanager
def temporary(path: Path, make: Callable[[Path], None] = Path.touch) -> Iterator[Path]:
    """Gives an empty file beside `path` for this writer alone, which is removed in the end.

    (Path.mkdir makes it a folder.)

    Another process may be writing the same file. Raises `OSError` where none can be made.
    """
    _remove_left_once(path.absolute().parent)
    writing, handle = _made_and_locked(_beside(path, "tmp"), make)
    try:
        yield writing
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            shutil.rmtree(writing) if writing.is_dir() else writing.unlink()


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Replaces a text file, of one text or many, so that a kill leaves the old or the new whole.

    So does a power cut. Raises `OSError` where it cannot be written.
    """
    with temporary(path) as writing:
        with writing.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
        sync(writing)
        writing.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- what is not whole yet ------------------------------------------------------------------------

# Another machine's lock on a shared file system may not be seen here, so that names tell machines
# apart, and what another one left is its own to remove.
_HERE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]
_LEFT = re.compile(r"\..+\.([0-9a-f]{4})[0-9a-f]{8}\.(tmp|partial)")


def is_left_over(name: str) -> bool:
    """Whether a name is of what a writer has not finished, and may have been killed over."""
    return _LEFT.fullmatch(name) is not None


def _beside(path: Path, kind: str) -> Path:
    """A hidden name beside `path` of this writer's own, never longer than a name may be."""
    return path.with_name(f".{path.name[:50]}.{_HERE}{secrets.token_hex(4)}.{kind}")


def _old(folder: Path) -> Path:
    """Where a folder lies while another takes its name."""
    folder = folder.resolve()
    name = folder.name
    if len(os.fsencode(name)) > 200:  # no name is longer than 255 bytes
        name = f"{name[:30]}.{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return folder.with_name(f".{name}.old")


def _made_and_locked(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """Makes a file or folder; until the handle is closed, `_remove_left` leaves it alone."""
    while True:
        make(path)
        with contextlib.suppress(FileNotFoundError):  # removed before it was locked
            handle = os.open(path, os.O_RDONLY)
            _lock(handle, wait=True)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return path, handle
            os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Holds a file or folder against other processes; False if one has it and for want of locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove_left(folder: Path) -> None:
    """Removes what writers that were killed left half written in a folder."""
    with contextlib.suppress(OSError):  # a folder that may be written to, but not listed
        for path in folder.iterdir():
            if (left := _LEFT.fullmatch(path.name)) and left[1] == _HERE:
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    """Removes a file or folder unless a writer holds it, or it is not this user's."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            if _lock(handle, wait=False):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            os.close(handle)


# A large folder takes a while to list, and may be written to ten thousand times.
_remove_left_once = functools.cache(_remove_left)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes that want the same from giving names to folders in this one."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        yield
    finally:
        os.close(handle)
