"""Tracks as data: what the source says of them, and the place from which a decoder reads them."""

import json
from dataclasses import dataclass
from typing import Literal

from magnet_jax.io.formats import RejectedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A track that is left out: its path as the source names it, and why."""

    path: str
    reason: str
    """One of a few fixed phrases, to be counted."""
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileBytes:
    """A file, or a range of its bytes: a member of a tar."""

    path: str
    offset: int = 0
    size: int | None = None
    """None is the whole file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBytes:
    """Audio within a table: a row of a Parquet file or an Arrow stream."""

    path: str
    kind: Literal["parquet", "arrow"]
    column: str
    """Of bytes, or of structs with 'bytes', as the `datasets` library has them."""
    row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldBytes:
    """Audio that was taken out of a table already."""

    path: str
    """Of the table, for messages."""
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a decoder is told of a track: the bytes, and which seconds of their sound."""

    place: FileBytes | RowBytes | HeldBytes
    start: float = 0.0
    """Seconds into the file."""
    duration: float | None = None
    """Seconds; None is up to the end of the file."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.place.path,)

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.duration is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Two parts that a decoder reads whole and mixes; `mixing` draws them."""

    parts: tuple[Part, Part]
    names: tuple[str, str]
    """The paths of both as the source names them, for the details of rejects."""
    snr: float
    """Of the first part over the second, in dB, each measured over all of it."""
    shift: float
    """Where the shorter part begins: from 0, with the longer one, to 1, to end with it."""
    level: float
    """Root mean square of the louder part in dBFS, unless peaks forbid it."""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(part.place.path for part in self.parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """Captioned audio that has not been opened yet: a file, a part of one, or a mix of two."""

    path: str
    """Below the source's root, for people and records."""
    track_id: str
    """Unlike that of any other track of the source; by default the path without suffix."""
    place: FileBytes | RowBytes | Mix
    captions: tuple[str, ...]
    """One at least, and the first is the caption."""
    fields: str
    """JSON object of whatever else goes with it, less what is null or not finite."""
    start: float = 0.0
    """Seconds into the file."""
    duration: float | None = None
    """Seconds; None is up to the end of the file."""

    @property
    def part(self) -> Part | Mix:
        """What a decoder is given: no captions, which may be long."""
        if isinstance(self.place, Mix):
            return self.place
        return Part(place=self.place, start=self.start, duration=self.duration)

    @property
    def name(self) -> str:
        """For messages: the path, and which part of its file it is."""
        return f"{self.path}{part_of(self)}"

    @property
    def caption(self) -> str:
        return self.captions[0]

    @property
    def info(self) -> str:
        """The fields, and under 'captions' the others if there are several: what records hold."""
        if len(self.captions) == 1:
            return self.fields
        fields = json.loads(self.fields) | {"captions": self.captions[1:]}
        return json.dumps(fields, sort_keys=True)


def part_of(track: Track) -> str:
    """For the details of rejects: which part of its file a track is; '' for a whole one."""
    is_part = track.start > 0 or track.duration is not None
    return f" ({track.track_id})" if is_part else ""


def rejected(track: Track, error: RejectedError) -> Reject:
    """What is noted of a track that a decoder found unfit."""
    return Reject(path=track.path, reason=error.reason, detail=error.detail + part_of(track))
