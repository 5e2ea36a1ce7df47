"""What all kinds of sources share: settings, paths that stay inside, captions, fingerprints.

There may be millions of paths: they are strings, which take a fraction of the time and memory.
"""

import ast
import codecs
import contextlib
import errno
import gzip
import hashlib
import json
import math
import os
import stat
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from magnet_jax.errors import UserError
from tokenization.intake.audio import RejectedError, is_outage
from tokenization.source.settings import Columns, Source
from tokenization.track import Track

# Where captions and paths are looked for unless the user names the place.
CAPTION_NAMES = ("description", "caption", "text")
PATH_NAMES = ("path", "file_name", "filename", "file", "audio")
LARGEST_CAPTION = 2**22  # bytes, with all that is noted beside it
SIDECARS = (".json", ".JSON", ".txt", ".TXT")  # in the order in which they count
# Fields of AudioCraft that hold lists. A text in the first two is words with commas between them.
_KEYWORDS = ("keywords", "moods")
_LISTS = ("genre", "instrument")


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


# --- paths and bytes ---


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
    if not stat.S_ISREG(status.st_mode):  # (opening a pipe would wait for ever)
        raise RejectedError("unreadable", "not a regular file")
    if status.st_size == 0:  # (and a copy of no other)
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


# --- captions ---

Texts = tuple[tuple[str, ...], str]  # a track's captions and its other fields, as JSON


def captions_and_fields(captions: Iterable[Any], rest: Mapping[str, Any], where: str) -> Texts:
    """`where` is for rejects."""
    try:
        texts = tuple(texts_in(list(captions)))
        if not texts:
            raise RejectedError("no caption", f"no text in {where}")
        fields = {name: _field(name, _finite(value)) for name, value in rest.items()}
        fields = {name: value for name, value in fields.items() if value is not None}
        if "captions" in fields:  # under this name records have the other captions
            fields["captions_"] = fields.pop("captions")
        size = len("".join(texts).encode())
        # (tables may hold times and the like)
        content = json.dumps(fields, sort_keys=True, allow_nan=False, default=str)
        if "\\ud" in content:  # half a character, or an ordinary pair of halves
            json.dumps(fields, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RejectedError("no caption", f"{where} is not valid Unicode") from None
    except (ValueError, RecursionError):
        raise RejectedError("no caption", f"{where} is nested too deeply") from None
    if size + len(content) > LARGEST_CAPTION:
        detail = f"{where} and its other fields are larger than {LARGEST_CAPTION >> 20} MiB"
        raise RejectedError("no caption", detail)
    return texts, content


def texts_in(value: Any) -> list[str]:
    """The captions in a text, in a list, or in a list that was written as text."""
    value = written_list(value)
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value.strip()] if isinstance(value, str) and value.strip() else []


def written_list(value: Any) -> Any:
    """The list of texts that a text holds as Python or JSON write it; all else as it is."""
    found = _parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
    is_list = isinstance(found, list) and all(isinstance(item, str) for item in found)
    return found if is_list else value


def _field(name: str, value: Any) -> Any:
    if name in _KEYWORDS:
        return keywords_in(value)
    return written_list(value) if name in _LISTS else value


def keywords_in(value: Any) -> Any:
    """A list of keywords, however they were noted: as a list, as its text, or with commas."""
    if isinstance(value, list):
        return [
            word
            for item in value
            for word in ([item] if isinstance(item, str) else keywords_in(item) or [])
        ]
    if not isinstance(value, str):
        return None if value is None or isinstance(value, bool) else [value]
    found = _parsed(value)
    if found is not None:
        return keywords_in(found)
    text = value.strip()
    if text[:1] in ("[", "(", "{"):  # without quotes, or damaged
        return [word for part in text.split(",") if (word := part.strip(" [](){}'\""))]
    return [word for part in text.split(",") if (word := part.strip())]


def _parsed(text: str) -> list[Any] | str | None:
    """The list, or quoted text, that Python or JSON would read in a text; None if there is none."""
    text = text.strip()
    if f"{text[:1]}{text[-1:]}" not in ("[]", "()", "{}", '""', "''"):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(found, set | frozenset):
            found = sorted(found, key=repr)
        if isinstance(found, list | tuple):
            return list(found)
        if isinstance(found, str):
            return found
    return None


def merged_texts(first: Texts, later: Texts) -> Texts:
    """Those of two rows of one clip: all captions, and where fields differ all their values."""
    fields = json.loads(first[1])
    for name, value in json.loads(later[1]).items():
        known = fields.setdefault(name, value)
        if known != value:
            known = known if isinstance(known, list) else [known]
            values = value if isinstance(value, list) else [value]
            fields[name] = known + [item for item in values if item not in known]
    captions = tuple(dict.fromkeys(first[0] + later[0]))
    return captions, json.dumps(fields, sort_keys=True, allow_nan=False)


def _finite(value: Any) -> Any:
    """A value of JSON, which has neither NaN nor infinity nor bytes: None in their place."""
    if isinstance(value, float | bytes):
        return value if isinstance(value, float) and math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class TwiceError(ValueError):
    pass


def load_json(content: str | bytes) -> Any:
    """As `json.loads`, but a name that is there twice in one object is a ValueError too."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise TwiceError(f"{twice!r} is there twice")
        return fields

    return json.loads(content, object_pairs_hook=once)


def encoding_of(begin: bytes) -> str:
    """The encoding of a text file by its first bytes: UTF-8, or what spreadsheets call Unicode."""
    return "utf-16" if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_caption(file: BinaryIO, name: str) -> bytes:
    """All of a file that holds a caption; raises `RejectedError` if that is too much."""
    content = file.read(LARGEST_CAPTION + 1)
    if len(content) > LARGEST_CAPTION:
        raise RejectedError("no caption", f"{name}: larger than {LARGEST_CAPTION >> 20} MiB")
    return content


def read_json(content: bytes, name: str, columns: Columns) -> Texts:
    """Of the .json file `name`, AudioCraft's music or sound metadata among them."""
    try:
        fields = load_json(content)
    except UnicodeDecodeError:
        raise RejectedError("no caption", f"{name} is not UTF-8") from None
    except TwiceError as error:
        raise RejectedError("no caption", f"{name}: {error}") from None
    except (ValueError, RecursionError):
        raise RejectedError("no caption", f"{name} is not valid JSON") from None
    if not isinstance(fields, dict):
        raise RejectedError("no caption", f"{name} is not a JSON object")
    wanted = columns.caption or [n for n in CAPTION_NAMES if texts_in(fields.get(n))][:1]
    captions = [fields.pop(n, None) for n in wanted]
    names = " or ".join(f"'{n}'" for n in columns.caption or CAPTION_NAMES)
    return captions_and_fields(captions, fields, f"{name} under {names}")


def read_text(content: bytes, name: str, _: Columns) -> Texts:
    try:
        text = content.decode(encoding_of(content))
    except UnicodeDecodeError:
        raise RejectedError("no caption", f"{name} is not UTF-8") from None
    return captions_and_fields([text], {}, name)


class Sidecars:
    """The .json or else .txt beside audio, or else the .json of its name in --metadata."""

    def __init__(self, source: Source):
        self._columns = source.columns
        self._beyond = None if source.metadata is None else Root(source.metadata)
        self.by_name: dict[str, str] = {}
        """What was taken of --metadata, by the stems that took it."""

    def read(self, root: Root, stem: str) -> Texts:
        """Raises `RejectedError` where there is none, or none that can be read."""
        name = os.path.basename(stem)
        places = [(root, f"{stem}{suffix}") for suffix in SIDECARS]
        if self._beyond is not None:
            places += [(self._beyond, f"{name}{suffix}") for suffix in SIDECARS if is_json(suffix)]
        for folder, path in places:
            content = _content(folder, path)
            if content is not None:
                if folder is self._beyond:
                    self.by_name[stem] = path
                read = read_json if is_json(path) else read_text
                return read(content, os.path.basename(path), self._columns)
        raise RejectedError("no caption", f"no {name}.json or {name}.txt beside it")


def _content(folder: Root, path: str) -> bytes | None:
    """Of a file that holds a caption; None if there is none."""
    name = os.path.basename(path)
    try:
        real = folder.resolve(path)
    except RejectedError:
        detail = "its caption is a link out of the folder"
        raise RejectedError("outside the folder", detail) from None
    try:
        with open_regular(real) as file:
            return read_caption(file, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        if is_outage(error):
            raise
        raise RejectedError("no caption", f"{name}: {error.strerror}") from None


def is_json(path: str) -> bool:
    return path.lower().endswith(".json")
