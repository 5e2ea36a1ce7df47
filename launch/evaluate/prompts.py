"""Lists of prompts: ids and captions, of the files that people have them in."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from magnet_jax.errors import UserError
from tokenization.listing import CAPTION_NAMES
from tokenization.tables import RECIPES, filled, pattern_fields

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
    beside each clip.

    Args:
      path: the file or folder.
      limit: so many from the beginning.

    Raises:
      UserError: nothing in it, no captions, an id that is there twice or names no file.
    """
    readers = {".csv": _table, ".tsv": _table, ".jsonl": _lines, ".txt": _texts}
    if path.is_dir():
        found = _folder(path)
    elif path.suffix.lower() in readers:
        try:
            found = list(readers[path.suffix.lower()](path))
        except UnicodeDecodeError:
            raise UserError(f"--prompts {path}: is not UTF-8") from None
        except csv.Error as error:
            raise UserError(f"--prompts {path}: not a valid table ({error})") from None
    else:
        raise UserError(f"--prompts {path}: must be a folder, or end in {', '.join(readers)}")
    ids: set[str] = set()
    for prompt in found:
        if not re.fullmatch(r"[^/\\\0]+", prompt.id) or prompt.id.startswith("."):
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


def sidecar(audio: Path) -> str | None:
    """The caption in the .json or .txt beside a clip, `launch.sample`'s among them; None without.

    Raises `UserError` for a .json that is none, and for a .txt that is not UTF-8.
    """
    path = audio.with_suffix(".json")
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        return _first(fields, _CAPTIONS) if isinstance(fields, dict) else None
    path = audio.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; save it as UTF-8") from None


def _folder(folder: Path) -> list[Prompt]:
    stems = {path.stem for path in folder.iterdir() if path.suffix in (".json", ".txt")}
    texts = {stem: sidecar(folder / f"{stem}.wav") for stem in sorted(stems)}
    return [Prompt(stem, text, (stem,)) for stem, text in texts.items() if text]


def _table(path: Path) -> Iterator[Prompt]:
    delimiter, between = ("\t", "tabs") if path.suffix.lower() == ".tsv" else (",", "commas")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        names = rows.fieldnames or []
        patterns = [
            pattern
            for recipe in RECIPES.values()
            for pattern in recipe.names
            if set(pattern_fields(pattern)) <= set(names)
        ]
        for row in rows:
            if any(row.pop(None, ())):  # (what is beyond the last column)
                raise UserError(
                    f"{path}, line {rows.line_num}: {len(names)} columns, but more cells; put a "
                    f"caption with {between} in it in double quotes"
                )
            yield _prompt(row, f"{path}, line {rows.line_num}", patterns)


def _lines(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(fields, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
            yield _prompt(fields, f"{path}, line {number}", [])


def _texts(path: Path) -> Iterator[Prompt]:
    texts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    for index, text in enumerate(filter(None, texts)):
        yield Prompt(f"{index:05d}", text, (f"{index:05d}",))


def _prompt(row: Mapping, where: str, patterns: list[str]) -> Prompt:
    found, text = _first(row, _IDS), _first(row, _CAPTIONS)
    if found is None or text is None:
        wanted = _CAPTIONS if found else _IDS
        raise UserError(f"{where}: nothing under {', '.join(wanted)} (it has {', '.join(row)})")
    name = Path(found).stem if re.search(r"\.(wav|flac|mp3|ogg)$", found) else found
    names = [filled(pattern, row) for pattern in patterns]
    return Prompt(name, text, tuple(dict.fromkeys([name, *filter(None, names)])))


def _first(row: Mapping, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = row.get(name)
        if isinstance(value, list):  # several captions of one clip: the first, as in tokenization
            value = next((text for text in value if isinstance(text, str) and text.strip()), None)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None
