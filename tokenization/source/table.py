"""Tables of tracks: .csv, .tsv, .jsonl, Parquet and Arrow; the last two may hold the audio."""

import functools
import hashlib
import json
import math
import os
import string
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from magnet_jax.errors import UserError
from tokenization.intake.audio import SUFFIXES, RejectedError
from tokenization.source.captions import (
    CAPTION_NAMES,
    Texts,
    captions_and_fields,
    keywords_in,
)
from tokenization.source.paths import (
    PATH_NAMES,
    Ends,
    Root,
    Task,
    buffer_ends,
    file_ends,
    is_hidden,
    printable,
    range_ends,
    refuse,
    refuse_metadata,
    split,
)
from tokenization.source.rows import Row, check_names, read_rows
from tokenization.source.settings import Source
from tokenization.track import FileBytes, RowBytes, Track


@dataclass(frozen=True, kw_only=True)
class KnownTable:
    """A table whose columns are known, and what its clips are called by those who fetch them."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    keywords: str | None = None
    """Column with a list of keywords."""


RECIPES = {
    "musiccaps": KnownTable(
        names=("{ytid}", "[{ytid}]-[{start_s}-{end_s}]", "{ytid}_{start_s}_{end_s}"),
        captions=("caption",),
        keywords="aspect_list",
    ),
    "audiocaps": KnownTable(
        names=("{youtube_id}", "Y{youtube_id}", "{youtube_id}_{start_time}", "{audiocap_id}"),
        captions=("caption",),
    ),
    "clotho": KnownTable(
        names=("{file_name}",), captions=tuple(f"caption_{i}" for i in range(1, 6))
    ),
}  # fmt: skip


_FIRST_ROWS = 100  # that show whether a column of texts names files
_LATEST = 1e7  # seconds into a file; what is beyond is a mistake, or meant to do harm


class _Table:
    """How the rows of a table are read; the names of its columns are checked once."""

    def __init__(self, source: Source, path: Path, names: list[str]):
        self.source = source
        refuse_metadata(source, path)
        check_names(path, names)
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
            raise UserError(
                f"{path}: no column of paths; name one, --columns.path, or give a pattern such as "
                f"'wavs/{{id}}.wav' there ({has})"
            )
        plain = [n for n in (columns.start, columns.duration, columns.end, columns.id) if n]
        for name in (*pattern_fields(self.patterns[0]), *self.captions, *plain):
            if name not in names:
                raise UserError(f"{path}: no column {name!r} ({has})")
        self.used = {*plain, *self.captions, *self.patterns}
        self.files, self.others = {}, {}
        if self.recipe and not columns.path:
            self._list_by_name()

    def _list_by_name(self) -> None:
        """Notes the audio below the root by its name, with and without suffix.

        `others` has a second file of a name. In one folder the first counts, as in a folder of
        audio.
        """

        def fail(error: OSError) -> None:
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None

        for folder, folders, names in os.walk(self.root.real, onerror=fail):
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            below = os.path.relpath(folder, self.root.real)
            for name in sorted(names):
                stem, suffix = split(name)
                if suffix in SUFFIXES and not is_hidden(name):
                    path = os.path.normpath(os.path.join(below, name))
                    for key in map(_composed, (name, stem)):
                        first = self.files.setdefault(key, path)
                        if os.path.dirname(first) != os.path.dirname(path):
                            self.others.setdefault(key, path)

    def path(self, row: Row) -> str:
        """The path a row names; '' if it names none."""
        if not self.recipe or self.source.columns.path:
            (pattern,) = self.patterns
            value = filled(pattern, row) if "{" in pattern else row.get(pattern)
            return value if isinstance(value, str) and value.strip() else ""
        names = [filled(pattern, row) for pattern in self.patterns]
        for name in map(_composed, names):
            # A table may say .wav where the clip was kept as .flac.
            stem, suffix = split(name)
            for key in (name, stem) if suffix in SUFFIXES else (name,):
                if key in self.others:
                    both = f"{self.files[key]} and {self.others[key]}"
                    detail = f"both {both} are called {key}; --root can name one folder"
                    raise RejectedError("ambiguous", printable(detail))
                if key in self.files:
                    return self.files[key]
        return names[0]

    def texts(self, row: Row) -> Texts:
        captions = [row.get(name) for name in self.captions]
        fields = {
            name: value
            for name, value in row.items()
            if name not in self.used and value not in (None, "")
        }
        if self.recipe and self.recipe.keywords in fields:
            fields["keywords"] = keywords_in(fields.pop(self.recipe.keywords))
        names = " or ".join(f"'{name}'" for name in self.captions)
        return captions_and_fields(captions, fields, f"its row under {names}")

    def part(self, row: Row) -> tuple[float, float | None]:
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

    def track_id(self, row: Row, default: str, start: float, duration: float | None) -> str:
        if self.source.columns.id:
            value = row.get(self.source.columns.id)
            name = "" if value is None or value != value else str(value).strip()
            if not name or printable(name) != name:
                raise RejectedError("bad row", f"no {self.source.columns.id}")
            return name
        # In full, as parts may differ in a sample.
        if duration is not None:
            return f"{default}@{start!r}+{duration!r}"
        return f"{default}@{start!r}" if self.source.columns.start else default


def _composed(name: str) -> str:
    """The name in the form that names are compared in: macOS takes accents apart."""
    return unicodedata.normalize("NFC", name.strip())


def filled(pattern: str, row: Row) -> str:
    """'' if a column that it takes has nothing in this row."""
    if any(row.get(name) in (None, "") for name in pattern_fields(pattern)):
        return ""
    try:
        return pattern.format_map(row)
    except (ValueError, TypeError, LookupError, AttributeError, MemoryError) as error:
        reason = str(error) or "too long"
        raise UserError(f"--columns.path {pattern}: {reason}") from None


def pattern_fields(pattern: str) -> list[str]:
    """The columns that a pattern, or a plain name, refers to."""
    if "{" not in pattern:
        return [pattern]
    try:
        return [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise UserError(f"--columns.path {pattern}: {error}") from None


def _number(row: Row, name: str | None) -> float | None:
    given = row.get(name) if name else None
    if given in (None, ""):
        return None
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or isinstance(given, bool):
        raise RejectedError("bad row", f"its {name} is no number of seconds")
    return value


def text_tasks(source: Source, path: Path) -> Iterator[Task]:
    """Of a .csv, .tsv or .jsonl."""
    names, rows = read_rows(path)
    table = _Table(source, path, names)
    empty = True
    for number, row in rows:
        empty = False
        where = f"{printable(path.name)}, line {number}"
        if isinstance(row, RejectedError):
            yield where, refuse(row.reason, row.detail)
        else:
            yield _row_task(table, row, where)
    if empty:
        raise UserError(f"{path}: no row in it")


def _row_task(table: _Table, row: Row, where: str) -> Task:
    try:
        path = table.path(row)
    except RejectedError as error:
        return where, refuse(error.reason, error.detail)
    if not path:
        return where, refuse("bad row", "no path in it")
    return printable(path), functools.partial(_row_track, table, row, path, where)


def _row_track(table: _Table, row: Row, path: str, where: str) -> tuple[Track, Ends]:
    try:
        real, below, ends = table.root.find(path)
        captions, fields = table.texts(row)
        start, duration = table.part(row)
        track_id = table.track_id(row, os.path.splitext(below)[0], start, duration)
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


# --- rows beside the files that they are about --------------------------------------------------

METADATA = ("metadata.jsonl", "metadata.csv")


class Listed:
    """The rows of a folder's metadata.jsonl or metadata.csv, by the files that they name."""

    def __init__(self, source: Source, root: Root, below: str, name: str):
        """root: of the source; below: the path in it of the folder, with its slash."""
        self.name = name
        self.is_used = False
        """Whether there is audio whose caption can stand here alone."""
        self._refused: list[Task] = []
        self._rows: dict[str, list[tuple[Row, str]]] = {}
        self._error: UserError | None = None
        try:
            self._read(source, root, below)
        except UserError as error:  # folders may have a file of this name for other ends
            self._error = error

    def _read(self, source: Source, root: Root, below: str) -> None:
        path = Path(root.given, below, self.name)
        try:
            root.resolve(below + self.name)
        except RejectedError as error:
            raise UserError(f"{path}: {error.detail}") from None
        names, rows = read_rows(path)
        column = next((name for name in ("file_name", *PATH_NAMES) if name in names), None)
        if column is None:
            return
        columns = replace(source.columns, path=column)
        table = _Table(replace(source, metadata=None, columns=columns), path, names)
        self._texts = table.texts
        for number, row in rows:
            where = f"{printable(below + self.name)}, line {number}"
            if isinstance(row, RejectedError):
                self._refused.append((where, refuse(row.reason, row.detail)))
            elif not (named := table.path(row)):
                self._refused.append((where, refuse("bad row", "no path in it")))
            else:
                whole = os.path.join(root.given, below, named.replace("\\", "/"))
                key = _composed(os.path.relpath(whole, root.given))
                self._rows.setdefault(key, []).append((row, where))

    def take(self, path: str) -> list[Callable[[], Texts]]:
        """What the rows about a file say, each as a call that may raise."""
        if self._error:
            return [self._fail]
        rows = self._rows.pop(_composed(path), [])
        return [functools.partial(self._say, row, where) for row, where in rows]

    def _fail(self) -> Texts:
        raise self._error

    def _say(self, row: Row, where: str) -> Texts:
        try:
            return self._texts(row)
        except RejectedError as error:
            raise RejectedError(error.reason, f"{error.detail} ({where})") from None

    def left(self, root: Root) -> Iterator[Task]:
        """Rejects for the rows that make no sense, and for those about files that were not taken.

        None if all audio has captions elsewhere: the table is then one for other ends.
        """
        if self.is_used:
            yield from self._refused
            for path, rows in self._rows.items():
                yield printable(path), functools.partial(_not_taken, root, path, rows[0][1])


def _not_taken(root: Root, path: str, where: str) -> tuple[Track, Ends]:
    try:
        root.find(path)
    except RejectedError as error:
        raise RejectedError(error.reason, f"{error.detail} ({where})") from None
    suffix = split(path)[1]
    if suffix in SUFFIXES:
        raise RejectedError("hidden", f"a linked folder, or one that is passed over ({where})")
    raise RejectedError("unknown format", f"{suffix or 'no suffix'} ({where})")


def listed_in(source: Source, root: Root, below: str, names: set[str]) -> Listed | None:
    """What a folder's metadata file says of its audio, and of that below; None without one."""
    found = [name for name in METADATA if name in names]
    if len(found) > 1:
        raise UserError(f"{root.given}/{below}: has {' and '.join(found)}; keep one of them")
    return Listed(source, root, below, found[0]) if found else None


# --- tables that may hold the audio itself ------------------------------------------------------


def parquet_tasks(source: Source, paths: list[Path], digest: "hashlib._Hash") -> Iterator[Task]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        name, real = printable(path.name), os.path.realpath(path)
        try:
            with pq.ParquetFile(path) as file:

                def first(name: str, file: pq.ParquetFile = file) -> list[Any]:
                    batches = file.iter_batches(_FIRST_ROWS, columns=[name])
                    return [value for batch in islice(batches, 1) for value in _values(batch[0])]

                table, column, names = _arrow_table(source, path, file.schema_arrow, first)
                # Rows cannot be told apart without unpacking all: the file stands for them.
                embedded = _chunks_of_bytes(file.metadata, column) if column else []
                if embedded:
                    digest.update(file_ends(real).digest)
                for offset, size in embedded:
                    digest.update(range_ends(real, offset, size).digest)
                wanted = [*names, f"{column}.path"] if column and not embedded else names
                row = 0
                for batch in file.iter_batches(columns=wanted):
                    for values in _dicts(batch):
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
            first = functools.partial(_first_of_stream, path)
            table, column, names = _arrow_table(source, path, batches.schema, first)
            for batch in batches:
                _validate(batch)
                for i, values in enumerate(_dicts(batch.select(names))):
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


def _first_of_stream(path: Path, name: str) -> list[Any]:
    import pyarrow as pa

    for batch in pa.ipc.open_stream(pa.memory_map(os.fspath(path))):
        _validate(batch)
        return _values(batch.column(name)[:_FIRST_ROWS])
    return []


def _validate(batch: Any) -> None:
    """Raises for damaged lengths, which would end this process; texts need not be UTF-8."""
    import pyarrow as pa

    batch.validate()
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            kind = _as_bytes(column.type)
            if kind == column.type:
                raise
            column.view(kind).validate(full=True)


def _as_bytes(kind: Any) -> Any:
    """A type with bytes in place of texts."""
    import pyarrow as pa

    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_as_bytes(kind.value_type), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_bytes(field.type)) for field in kind])
    return kind


def _dicts(batch: Any) -> Iterator[dict[str, Any]]:
    columns = [_values(column) for column in batch.columns]
    for row in zip(*columns):
        yield dict(zip(batch.schema.names, row))


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except Exception:  # a few values: dates before Christ, time zones of another planet
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    """As Python has it, with half characters for what is not UTF-8; NaN for what it cannot hold."""
    import pyarrow as pa

    try:
        return scalar.as_py()
    except Exception:  # of many kinds, those of libraries of time zones among them
        if isinstance(scalar, pa.StringScalar):
            return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape")
        if isinstance(scalar, pa.DictionaryScalar):
            return _value(scalar.value)
        if isinstance(scalar, pa.StructScalar):
            return {name: _value(scalar[name]) for name in scalar}
        if isinstance(scalar, pa.ListScalar):
            return [_value(item) for item in scalar.values]
        return math.nan


def _arrow_table(
    source: Source, path: Path, schema: Any, first: Callable[[str], list[Any]]
) -> tuple[_Table, str | None, list[str]]:
    """The table, its column of audio (None: only paths), and its columns that are neither.

    first: gives the values that a column begins with.
    """
    import pyarrow as pa

    def holds_bytes(field: Any) -> bool:  # plain, or as the `datasets` library keeps audio
        if pa.types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return field.type in (pa.binary(), pa.large_binary(), pa.binary_view())

    check_names(path, schema.names)
    binary = [field.name for field in schema if holds_bytes(field)]
    names = [name for name in schema.names if name not in binary]
    column = source.columns.path
    if column is None:
        root = Root(source.root or path.parent)
        column = _audio_column(schema, binary, lambda name: _any_there(root, first(name)))
    if column not in binary:
        return _Table(source, path, names), None, names
    source = replace(source, columns=replace(source.columns, path=column))
    return _Table(source, path, [*names, column]), column, names


def _audio_column(schema: Any, binary: list[str], is_there: Callable[[str], bool]) -> str | None:
    """The column of bytes that is the audio; None if none is.

    is_there: whether a column of texts names files.
    """
    kinds = {name: _kind_of(schema, name) for name in binary}
    binary = [name for name in binary if kinds[name] != "Image"]
    known = [name for name in PATH_NAMES if name in binary]
    known += [name for name in binary if kinds[name] == "Audio"]
    paths = [name for name in PATH_NAMES if name in schema.names and name not in kinds]
    if not known and paths and is_there(paths[0]):
        return None  # bytes beside it are something else, such as a picture
    return next(iter((*known, *binary)), None)


def _kind_of(schema: Any, name: str) -> str | None:
    """What the `datasets` library notes that a column is, such as Audio or Image."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"][name]["_type"]
    except (KeyError, TypeError, ValueError):
        return None


def _any_there(root: Root, paths: list[Any]) -> bool:
    for path in paths:
        try:
            if isinstance(path, str) and path.strip():
                root.find(path)
                return True
        except (RejectedError, OSError):
            continue
    return False


def _path_in(value: Any) -> str | None:
    """The path within the value of a column of audio, as the `datasets` library has it."""
    return value.get("path") if isinstance(value, dict) else None


def _embedded_task(
    table: _Table,
    values: Row,
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
