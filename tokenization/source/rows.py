"""Rows of tables that are text: .csv, .tsv and .jsonl, each with the line it begins on.

Python's csv would let a quote that nothing closes swallow the rows below it, and bounds cells.
"""

import io
import re
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from magnet_jax.errors import UserError
from tokenization.intake.audio import SUFFIXES, RejectedError
from tokenization.source.captions import (
    LARGEST_CAPTION,
    encoding_of,
    load_json,
)
from tokenization.source.paths import (
    open_listing,
    printable,
    split,
)

Row = Mapping[str, Any]
Numbered = tuple[int, Row | RejectedError]

_JSON = (".jsonl", ".jsonl.gz", ".jsons", ".jsons.gz")
_SEPARATED = {".csv": (",", "commas"), ".tsv": ("\t", "tabs")}
_HEAD = 1000  # rows of .jsonl whose names are all that a table of them is said to have

_OPENING = re.compile(' *"')  # people put a space after a comma
_CLOSING = re.compile(r'[^"]*(?:""[^"]*)*"(?!")')


def read_rows(path: Path) -> tuple[list[str], Iterator[Numbered]]:
    """The names of a table's columns, and its rows with the line that each begins on.

    A row that makes no sense comes as a `RejectedError`, and those after it are read. What is not
    UTF-8 comes as half characters (surrogateescape), to be found where it matters.
    Raises `UserError`, also while rows are read, for a table that cannot be read at all.
    """
    if path.name.lower().endswith(_JSON):
        return _json_names(path), _json_rows(path)
    rows = _separated_rows(path)
    return next(rows), rows


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raises `UserError` if two columns have one name, as either could be meant."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{path}: {count} columns are called {name!r}; rename all but one")


# --- cells with separators between them ---


def _separated_rows(path: Path) -> Iterator[Any]:
    """First the names, then the rows."""
    delimiter, between = _SEPARATED[path.suffix.lower()]
    with open_listing(path) as file:
        encoding = encoding_of(file.peek(4))
        text = io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape", newline="")
        lines = _Lines(text)
        try:
            names = _header(path, lines, delimiter)
            yield names
            while (line := lines.take()) is not None:
                number = lines.number
                try:
                    cells = _cells(line, lines, delimiter, len(names))
                except RejectedError as error:
                    yield number, error
                    continue
                if any(cells[len(names) :]):
                    detail = (
                        f"{len(names)} columns, but more cells; quote its captions: a caption with "
                        f"{between} in it goes into double quotes"
                    )
                    yield number, RejectedError("bad row", detail)
                elif any(cells):
                    yield number, dict.fromkeys(names) | dict(zip(names, cells))
        except UnicodeError as error:  # UTF-16 knows no half characters
            raise UserError(f"{path}: is not {encoding} ({error})") from None


def _header(path: Path, lines: "_Lines", delimiter: str) -> list[str]:
    cells: list[str] = []
    while not any(cells):
        line = lines.take()
        if line is None:
            raise UserError(f"{path}: is empty; its first line should name the columns")
        if "\0" in line:
            raise UserError(f"{path}: is no text; save it as UTF-8")
        try:
            cells = _cells(line, lines, delimiter, 0)
        except RejectedError as error:
            raise UserError(f"{path}, line {lines.number}: {error.detail}") from None
    names = [cell.strip() for cell in cells]
    if any(printable(name) != name for name in names):
        raise UserError(f"{path}, line {lines.number}: names of columns are not UTF-8")
    while names and not names[-1]:  # of a spreadsheet; a caption that commas cut goes on there
        names.pop()
    check_names(path, names)
    return names


class _Lines:
    """Lines of a file, of which some can be put back."""

    def __init__(self, file: Iterable[str]):
        self._file = iter(file)
        self._again: deque[str] = deque()
        self.number = 0
        """Of the line that was taken last."""

    def take(self) -> str | None:
        line = self._again.popleft() if self._again else next(self._file, None)
        self.number += line is not None
        return line

    def put_back(self, lines: list[str]) -> None:
        self._again.extendleft(reversed(lines))
        self.number -= len(lines)


def _cells(line: str, lines: _Lines, delimiter: str, columns: int) -> list[str]:
    """The cells of the row that begins with a line; raises for a quote that nothing closes."""
    if '"' not in line:
        return line.rstrip("\r\n").split(delimiter)
    cells, at, goes_on = [], 0, True
    while goes_on:
        opening = _OPENING.match(line, at)
        quoted = opening and _quoted(line, opening.end(), lines, delimiter, columns)
        if quoted:
            cell, line, at, goes_on = quoted
        else:
            end = line.find(delimiter, at)
            goes_on = end >= 0
            cell = line[at:end] if goes_on else line[at:].rstrip("\r\n")
            at = end + 1
        cells.append(cell)
    return cells


def _quoted(
    line: str, at: int, lines: _Lines, delimiter: str, columns: int
) -> tuple[str, str, int, bool] | None:
    """A cell in quotes: its text, the line it ends on, where the next begins, whether one does.

    It may hold separators, and go on over further lines. None where the quotes are part of the
    text: if text follows them on the same line, or nothing closes them where the separator is a
    tab, as such tables are mostly written without quoting. Between commas that raises.
    """
    parts, taken, size = [], [], 0
    while True:
        closing = _CLOSING.match(line, at)
        within = line[at : closing.end() - 1] if closing else line[at:]
        parts.append(within)
        size += len(within)
        if (taken and _is_row(within, delimiter, columns)) or size > LARGEST_CAPTION:
            break
        if closing:
            after = re.compile(rf" *({delimiter}|[\r\n]*\Z)").match(line, closing.end())
            if after:
                text = "".join(parts).replace('""', '"')
                return text, line, after.end(), after[1] == delimiter
            break
        if (following := lines.take()) is None:
            break
        taken.append(following)
        line, at = following, 0
    lines.put_back(taken)
    if delimiter == "\t" or (closing and not taken):
        return None
    raise RejectedError("bad row", "a quote that nothing closes; within a cell, write it twice")


def _is_row(text: str, delimiter: str, columns: int) -> bool:
    """Whether a line that would lie within a cell is a row of its own."""
    cells = text.split(delimiter)
    if columns < 2 or len(cells) < columns:
        return False
    return delimiter == "\t" or any(split(cell.strip())[1] in SUFFIXES for cell in cells)


# --- JSON Lines ---


def _json_rows(path: Path) -> Iterator[Numbered]:
    number = 0
    with open_listing(path) as file:
        try:
            for line in file:
                number += 1
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, _json_row(line)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: damaged after line {number} ({error})") from None


def _json_row(line: bytes) -> Row | RejectedError:
    try:
        fields = load_json(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        return RejectedError("bad row", f"not valid JSON ({str(error)[:100]})")
    return (
        fields if isinstance(fields, dict) else RejectedError("bad row", "expected a JSON object")
    )


def _json_names(path: Path) -> list[str]:
    """The names in the first rows; rows of .jsonl need not have all."""
    names: dict[str, None] = {}
    rows = _json_rows(path)
    try:
        for _, (_, row) in zip(range(_HEAD), rows):
            names |= dict.fromkeys(row) if isinstance(row, dict) else {}
    except UserError:  # the rows say so where they are read
        pass
    finally:
        rows.close()
    return list(names)
