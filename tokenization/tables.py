"""Tables of tracks: .csv, .tsv, Parquet and Arrow; the last two may hold the audio itself."""

import ast
import csv
import functools
import hashlib
import math
import os
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from magnet_jax.errors import UserError
from tokenization.audio import SUFFIXES, FileBytes, RejectedError, RowBytes, Track
from tokenization.listing import (
    CAPTION_NAMES,
    PATH_NAMES,
    Ends,
    Root,
    Source,
    Task,
    Texts,
    buffer_ends,
    captions_and_fields,
    file_ends,
    printable,
    range_ends,
    refuse,
    split,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A table whose columns are known, and what its clips are called by those who fetch them."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    keywords: str | None = None
    """Column with a list of keywords, written as Python writes it."""


RECIPES = {
    "musiccaps": Recipe(
        names=("{ytid}", "[{ytid}]-[{start_s}-{end_s}]", "{ytid}_{start_s}_{end_s}"),
        captions=("caption",),
        keywords="aspect_list",
    ),
    "audiocaps": Recipe(
        names=("{youtube_id}", "Y{youtube_id}", "{youtube_id}_{start_time}", "{audiocap_id}"),
        captions=("caption",),
    ),
    "clotho": Recipe(
        names=("{file_name}",), captions=tuple(f"caption_{i}" for i in range(1, 6))
    ),
}  # fmt: skip


_LATEST = 1e7  # seconds into a file; what is beyond is a mistake, or meant to do harm


class _Table:
    """How the rows of a table are read; the names of its columns are checked once."""

    def __init__(self, source: Source, path: Path, names: list[str]):
        self.source = source
        self.root = Root(source.root or path.parent)
        self.recipe = source.recipe and RECIPES[source.recipe]
        columns = source.columns
        has = f"it has {', '.join(names)}"
        self.captions = columns.caption or (self.recipe.captions if self.recipe else ())
        if not self.captions:
            self.captions = tuple(name for name in CAPTION_NAMES if name in names)[:1]
        if not self.captions:
            raise UserError(f"{path}: no column of captions; name one, --columns.caption ({has})")
        if columns.path:
            self.patterns = (columns.path,)
        elif self.recipe:
            self.patterns = tuple(
                n for n in self.recipe.names if set(pattern_fields(n)) <= set(names)
            )
        else:
            self.patterns = tuple(name for name in PATH_NAMES if name in names)[:1]
        if not self.patterns:
            raise UserError(f"{path}: no column of paths; name one, --columns.path ({has})")
        plain = [n for n in (columns.start, columns.duration, columns.end, columns.id) if n]
        for name in (*pattern_fields(self.patterns[0]), *self.captions, *plain):
            if name not in names:
                raise UserError(f"{path}: no column {name!r} ({has})")
        used = {*plain, *self.captions, *self.patterns}
        self.others = [name for name in names if name not in used]
        self.files = self._by_name() if self.recipe and not columns.path else None

    def _by_name(self) -> dict[str, str]:
        """The audio below the root by its name, with and without suffix."""

        def fail(error: OSError) -> None:
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None

        files: dict[str, str] = {}
        for folder, folders, names in os.walk(self.root.real, onerror=fail):
            folders.sort()
            for name in sorted(names):
                stem, suffix = split(name)
                if suffix in SUFFIXES:
                    path = os.path.relpath(os.path.join(folder, name), self.root.real)
                    files.setdefault(name, path)
                    files.setdefault(stem, path)
        return files

    def path(self, row: Mapping[str, Any]) -> str:
        """The path a row names; '' if it names none."""
        if self.files is None:
            (pattern,) = self.patterns
            value = filled(pattern, row) if "{" in pattern else row[pattern]
            return value if isinstance(value, str) else ""
        names = [filled(pattern, row) for pattern in self.patterns]
        for name in names:
            # (a table may say .wav where the clip was kept as .flac)
            stem, suffix = split(name)
            for key in (name, stem) if suffix in SUFFIXES else (name,):
                if key in self.files:
                    return self.files[key]
        return names[0]

    def texts(self, row: Mapping[str, Any]) -> Texts:
        values = [row[name] for name in self.captions]
        captions = [text for v in values for text in (v if isinstance(v, list) else [v])]
        fields = {name: row[name] for name in self.others if row[name] not in (None, "")}
        if self.recipe and self.recipe.keywords in fields:
            try:
                fields["keywords"] = list(ast.literal_eval(fields.pop(self.recipe.keywords)))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                raise RejectedError("bad row", f"{self.recipe.keywords} is no list") from None
        names = " or ".join(f"'{name}'" for name in self.captions)
        return captions_and_fields(captions, fields, f"its row under {names}")

    def part(self, row: Mapping[str, Any]) -> tuple[float, float | None]:
        """(start, duration) in seconds."""
        columns = self.source.columns
        start, duration, end = (
            _number(row, name) for name in (columns.start, columns.duration, columns.end)
        )
        start = start or 0.0
        if duration is None and end is not None:
            duration = end - start
        if max(start, duration or 0) > _LATEST:
            raise RejectedError("bad row", f"it begins, or goes on, after {_LATEST:g} s")
        if start < 0 or (duration is not None and duration <= 0):
            raise RejectedError("bad row", "it begins before the file, or ends before it begins")
        return start, duration

    def track_id(
        self, row: Mapping[str, Any], default: str, start: float, duration: float | None
    ) -> str:
        if self.source.columns.id:
            value = row[self.source.columns.id]
            if value in (None, ""):
                raise RejectedError("bad row", f"no {self.source.columns.id}")
            return str(value)
        # (in full, as parts may differ in a sample)
        if duration is not None:
            return f"{default}@{start!r}+{duration!r}"
        return f"{default}@{start!r}" if self.source.columns.start else default


def filled(pattern: str, row: Mapping[str, Any]) -> str:
    """'' if a column that it takes has nothing in this row."""
    if any(row[name] in (None, "") for name in pattern_fields(pattern)):
        return ""
    try:
        return pattern.format_map(row)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"--columns.path {pattern}: {error}") from None


def pattern_fields(pattern: str) -> list[str]:
    """The columns that a pattern, or a plain name, refers to."""
    if "{" not in pattern:
        return [pattern]
    try:
        return [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise UserError(f"--columns.path {pattern}: {error}") from None


def _number(row: Mapping[str, Any], name: str | None) -> float | None:
    if name is None or row[name] in (None, ""):
        return None
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise RejectedError("bad row", f"its {name} is no number of seconds")
    return value


def csv_tasks(source: Source, path: Path) -> Iterator[Task]:
    # (what is not UTF-8 comes out as half characters, and is found where it matters)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            names = list(rows.fieldnames or [])
            table = _Table(source, path, names)
            for row in rows:
                where = f"{printable(path.name)}, line {rows.line_num}"
                if any(row.pop(None, ())):
                    yield where, refuse("bad row", "more cells than columns: quote its captions")
                else:
                    yield _row_task(table, row, where)
        except csv.Error as error:
            raise UserError(f"{path}: line {rows.line_num}: {error}") from None


def _row_task(table: _Table, row: Mapping[str, Any], where: str) -> Task:
    path = table.path(row)
    if not path:
        return where, refuse("bad row", "no path in it")
    return printable(path), functools.partial(_row_track, table, row, path, where)


def _row_track(table: _Table, row: Mapping[str, Any], path: str, where: str) -> tuple[Track, Ends]:
    try:
        real = table.root.resolve(path)
        below = table.root.relative(path)
        ends = file_ends(real)
        captions, fields = table.texts(row)
        start, duration = table.part(row)
        track_id = table.track_id(row, os.path.splitext(below)[0], start, duration)
    except FileNotFoundError:
        raise RejectedError("missing", f"no such file ({where})") from None
    except RejectedError as error:
        raise RejectedError(error.reason, f"{error.detail} ({where})") from None
    track = Track(
        path=below,
        track_id=track_id,
        place=FileBytes(path=real),
        captions=captions,
        fields=fields,
        start=start,
        duration=duration,
    )
    return track, ends


# --- tables that may hold the audio itself ------------------------------------------------------


def parquet_tasks(source: Source, paths: list[Path], digest: "hashlib._Hash") -> Iterator[Task]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        name, real = printable(path.name), os.path.realpath(path)
        try:
            with pq.ParquetFile(path) as file:
                table, column, names = _arrow_table(source, path, file.schema_arrow)
                # Rows cannot be told apart without unpacking all: the file stands for them.
                embedded = _chunks_of_bytes(file.metadata, column) if column else []
                if embedded:
                    digest.update(file_ends(real).digest)
                for offset, size in embedded:
                    digest.update(range_ends(real, offset, size).digest)
                wanted = [*names, f"{column}.path"] if column and not embedded else names
                row = 0
                for batch in file.iter_batches(columns=wanted):
                    for values in batch.to_pylist():
                        if embedded:
                            place = RowBytes(path=real, kind="parquet", column=column, row=row)
                            yield _embedded_task(table, values, name, place, None)
                        else:
                            if column:
                                values[column] = _path_in(values.get(column))
                            yield _row_task(table, values, f"{name}, row {row}")
                        row += 1
        except (pa.ArrowException, ValueError, OSError) as error:
            raise UserError(f"{path}: not readable as Parquet ({error})") from None


def _chunks_of_bytes(metadata: Any, column: str) -> list[tuple[int, int]]:
    """(offset, bytes) of a Parquet file's column of audio in each row group that has any."""
    chunks = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(group.num_columns):
            part = group.column(j)
            if part.path_in_schema in (column, f"{column}.bytes"):
                statistics = part.statistics
                if statistics is None or statistics.null_count != group.num_rows:
                    offset = part.dictionary_page_offset or part.data_page_offset
                    chunks.append((offset, part.total_compressed_size))
    return chunks


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that the `datasets` library saved."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f'audio {folder}: a saved data set takes the datasets library: pip install ".[hf]"'
        ) from None
    try:
        saved = datasets.load_from_disk(os.fspath(folder))
    except Exception as error:  # what it raises depends on the damage
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"audio {folder}: damaged, not readable as a data set ({reason})") from None
    return [Path(file["filename"]) for file in saved.cache_files]


def arrow_tasks(source: Source, paths: list[Path]) -> Iterator[Task]:
    import pyarrow as pa

    for path in paths:
        name, real = printable(path.name), os.path.realpath(path)
        try:
            row = 0
            batches = pa.ipc.open_stream(pa.memory_map(os.fspath(path)))
            table, column, names = _arrow_table(source, path, batches.schema)
            for batch in batches:
                batch.validate(full=True)  # damaged lengths would end this process
                for i, values in enumerate(batch.select(names).to_pylist()):
                    value = batch.column(column)[i] if column else None
                    data = value["bytes"] if isinstance(value, pa.StructScalar) else value
                    if data is not None and data.is_valid:
                        ends = functools.partial(buffer_ends, data.as_buffer())
                        place = RowBytes(path=real, kind="arrow", column=column, row=row)
                        yield _embedded_task(table, values, name, place, ends)
                    else:
                        if column:
                            values[column] = _path_in(value.as_py())
                        yield _row_task(table, values, f"{name}, row {row}")
                    row += 1
        except (pa.ArrowException, ValueError, OSError) as error:
            raise UserError(f"{path}: not readable as an Arrow stream ({error})") from None


def _arrow_table(source: Source, path: Path, schema: Any) -> tuple[_Table, str | None, list[str]]:
    """The table, its column of audio (None: only paths), and its columns that are neither."""
    import pyarrow as pa

    def holds_audio(field: Any) -> bool:  # as bytes or as the `datasets` library keeps it
        if pa.types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)

    binary = [field.name for field in schema if holds_audio(field)]
    names = [name for name in schema.names if name not in binary]
    column = source.columns.path
    if column is None:
        column = next((name for name in (*PATH_NAMES, *binary) if name in binary), None)
    if column not in binary:
        return _Table(source, path, names), None, names
    source = replace(source, columns=replace(source.columns, path=column))
    return _Table(source, path, [*names, column]), column, names


def _path_in(value: Any) -> str | None:
    """The path within the value of a column of audio, as the `datasets` library has it."""
    return value.get("path") if isinstance(value, dict) else None


def _embedded_task(
    table: _Table,
    values: Mapping[str, Any],
    name: str,
    place: RowBytes,
    ends: Callable[[], Ends] | None,
) -> Task:
    shown = f"{name}/{place.row}"

    def make() -> tuple[Track, Ends | None]:
        captions, fields = table.texts(values)
        start, duration = table.part(values)
        track = Track(
            path=shown,
            track_id=table.track_id(values, shown, start, duration),
            place=place,
            captions=captions,
            fields=fields,
            start=start,
            duration=duration,
        )
        return track, ends and ends()

    return shown, make
