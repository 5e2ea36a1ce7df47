"""Where captioned audio is, and how its captions are found."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of a table are called."""

    path: str | None = None
    """Audio file (default: path, file_name, filename, file or audio), or a pattern of columns such
    as '{id}.wav', or embedded audio."""
    caption: tuple[str, ...] = ()
    """Caption, or several (default: description, caption or text); also a field of .json files."""
    start: str | None = None
    """Where in its file the track begins, in seconds."""
    duration: str | None = None
    """How long the track is, in seconds; by default it goes on to the end of the file."""
    end: str | None = None
    """Where in its file the track ends, in seconds; stands in for duration."""
    id: str | None = None
    """Name of the track, unlike all others (default: its path without suffix)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where captioned audio is, see docs/data.md."""

    audio: Path
    """Folder of audio with song.json or song.txt beside each song.flac, or with a metadata.jsonl or
    metadata.csv; AudioCraft manifest (data.jsonl[.gz]) or its folder; table (.csv, .tsv, .jsonl,
    .parquet, folder of .parquet files); webdataset (.tar or folder of tars); folder of a data set
    saved by the `datasets` library."""
    root: Path | None = None
    """Folder that the paths in a manifest or table are below, and all that a folder of tars or
    Parquet files links to; by default the one that they lie in."""
    metadata: Path | None = None
    """Folder of further song.json files, by name alone, for audio that has none beside it."""
    recipe: Literal["musiccaps", "audiocaps", "clotho"] | None = None
    """Columns and file names of a public table."""
    columns: Columns = Columns()
