"""Captions, and the other fields of a track: in sidecars, rows, and as people write lists."""

import ast
import codecs
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from tokenization.intake.audio import RejectedError, is_outage
from tokenization.source.paths import (
    Root,
    open_regular,
)
from tokenization.source.settings import Columns, Source

# Where captions are looked for unless the user names the place.
CAPTION_NAMES = ("description", "caption", "text")
LARGEST_CAPTION = 2**22  # bytes, with all that is noted beside it
SIDECARS = (".json", ".JSON", ".txt", ".TXT")  # in the order in which they count
# Fields of AudioCraft that hold lists. A text in the first two is words with commas between them.
_KEYWORDS = ("keywords", "moods")
_LISTS = ("genre", "instrument")

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
        # Tables may hold times and the like.
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
