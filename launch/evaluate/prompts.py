"""Lists of prompts: ids and captions, of the files that people have them in."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from magnet_jax.errors import UserError
from magnet_jax.io.formats import SUFFIXES, RejectedError
from tokenization.source.captions import (
    CAPTION_NAMES,
    SIDECARS,
    encoding_of,
    is_json,
    load_json,
    texts_in,
)
from tokenization.source.paths import (
    is_hidden,
    split,
)
from tokenization.source.rows import Row, read_rows
from tokenization.source.table import METADATA, RECIPES, filled, pattern_fields

_CAPTIONS = (*CAPTION_NAMES, "caption_1", "prompt")
_IDS = ("id", "audiocap_id", "ytid", "youtube_id", "name", "path", "file_name", "filename", "file")


class Prompt(NamedTuple):
    """A clip to generate."""

    id: str
    """Of the file that is written: its name without suffix."""
    text: str
    names: tuple[str, ...]
    """What its reference clip may be called, without suffix."""


def read(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts in a file or folder.

    A .csv or .tsv has a column of ids and one of captions: MusicCaps' and AudioCaps' tables are
    known (`ytid`; `audiocap_id`, whose reference clip may be called by its `youtube_id`). A .jsonl
    has an object a line with the same names, a .txt a caption a line, and a folder a .json or .txt
    beside each clip, or a metadata.jsonl or metadata.csv about them.

    Args:
      path: the file or folder.
      limit: so many from the beginning.

    Raises:
      UserError: nothing in it, no captions, an id that is there twice or names no file.
    """
    readers = {".csv": _rows, ".tsv": _rows, ".jsonl": _rows, ".txt": _texts}
    reader = _folder if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--prompts {path}: must be a folder, or end in {', '.join(readers)}")
    try:
        found = list(reader(path))
    except UnicodeError:
        raise UserError(f"--prompts {path}: is not UTF-8") from None
    ids: set[str] = set()
    for prompt in found:
        is_name = re.fullmatch(r"[^/\\\0]+", prompt.id) and not prompt.id.startswith(".")
        if not is_name or len(prompt.id.encode()) > 250:  # with a suffix, no name is longer
            raise UserError(f"--prompts {path}: {prompt.id!r} cannot be the name of a file")
        if prompt.id in ids:
            raise UserError(
                f"--prompts {path}: {prompt.id} is there twice; where a clip has several captions, "
                "keep one, or give each an id"
            )
        if not prompt.text.strip():
            raise UserError(f"--prompts {path}: {prompt.id} has no caption")
        ids.add(prompt.id)
    if not found:
        raise UserError(f"--prompts {path}: no prompt in it")
    return found[:limit]


def digest(listed: list[Prompt]) -> str:
    """Tells one list from another: a hash of all ids and captions."""
    return hashlib.sha256(json.dumps([prompt[:2] for prompt in listed]).encode()).hexdigest()


def sidecar(audio: Path) -> str | None:
    """The caption in the .json or .txt beside a clip, `launch.sample`'s among them; None without.

    Raises `UserError` for a .json that is none, and for a .txt that is not UTF-8.
    """
    path = next((p for p in map(audio.with_suffix, SIDECARS) if p.is_file()), None)
    if path is None:
        return None
    if is_json(path.name):
        return _first(_object(path), _CAPTIONS)
    content = path.read_bytes()
    try:
        return content.decode(encoding_of(content)).strip() or None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; save it as UTF-8") from None


def fields(audio: Path) -> Row:
    """What the .json beside a clip holds; nothing without one.

    Raises `UserError` for a .json that is none.
    """
    beside = (path for path in map(audio.with_suffix, SIDECARS) if is_json(path.name))
    path = next(filter(Path.is_file, beside), None)
    return {} if path is None else _object(path)


def _object(path: Path) -> Row:
    try:
        found = load_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    return found if isinstance(found, dict) else {}


def _folder(folder: Path) -> Iterator[Prompt]:
    below = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    below = {path for path in below if not is_hidden(path)}
    clips = {Path(path).with_suffix("") for path in below if split(path)[1] in SUFFIXES}
    stems = {Path(path).with_suffix("") for path in below if path.endswith(SIDECARS)}
    stems = stems & clips if clips else stems  # (a text about none of the clips is a note)
    texts = {stem: sidecar(folder / f"{stem}.wav") for stem in sorted(stems)}
    named = {stem.name for stem, text in texts.items() if text}
    yield from (Prompt(stem.name, text, (stem.name,)) for stem, text in texts.items() if text)
    for name in METADATA:
        if name in below and "file_name" in read_rows(folder / name)[0]:
            yield from (prompt for prompt in _rows(folder / name) if prompt.id not in named)


def _rows(path: Path) -> Iterator[Prompt]:
    names, rows = read_rows(path)
    patterns = [
        pattern
        for recipe in RECIPES.values()
        for pattern in recipe.names
        if set(pattern_fields(pattern)) <= set(names)
    ]
    for number, row in rows:
        if isinstance(row, RejectedError):
            raise UserError(f"{path}, line {number}: {row.detail}")
        yield _prompt(row, f"{path}, line {number}", patterns)


def _texts(path: Path) -> Iterator[Prompt]:
    content = path.read_bytes()
    lines = content.decode(encoding_of(content)).replace("\r", "\n").split("\n")
    for index, text in enumerate(filter(None, map(str.strip, lines))):
        yield Prompt(f"{index:05d}", text, (f"{index:05d}",))


def _prompt(row: Row, where: str, patterns: list[str]) -> Prompt:
    found, text = _first(row, _IDS), _first(row, _CAPTIONS)
    if found is None or text is None:
        wanted = _CAPTIONS if found else _IDS
        raise UserError(f"{where}: nothing under {', '.join(wanted)} (it has {', '.join(row)})")
    f"{found}{text}".encode()  # half characters stand for what is not UTF-8
    is_file = split(found)[1] in SUFFIXES
    name = split(re.split(r"[/\\]", found)[-1])[0] if is_file else found
    names = [filled(pattern, row) for pattern in patterns]
    return Prompt(name, text, tuple(dict.fromkeys([name, *filter(None, names)])))


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    """The first text under one of the names: of several captions of a clip one, as in training."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if texts := texts_in(value):
            return texts[0]
    return None
