"""Audio intake: one track as samples, or why not.

`decode` is meant for a process of its own, see `decoder`: libraries that read other
people's files crash and hang.
"""

import functools
import io
import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO

import numpy as np
import soxr

from magnet_jax.io.formats import MISSING_SECONDS, Sound, check_channels, mix, open_sound, view
from magnet_jax.io.formats import SUFFIXES as SUFFIXES
from magnet_jax.io.formats import RejectedError as RejectedError
from magnet_jax.io.formats import is_outage as is_outage
from tokenization.track import FileBytes, HeldBytes, Part, RowBytes

SILENCE_DBFS = -60.0
LARGEST_PEAK = 8.0  # full scale is 1; samples of +-32768 are no float audio
CLIPPED = 1e-3  # a track of which a larger share is clipped counts as clipped


@dataclass(frozen=True, kw_only=True, slots=True)
class Intake:
    """What is asked of a track."""

    sample_rate: int | None
    """To resample to (soxr, VHQ); None leaves it as it is."""
    channels: int
    min_seconds: float = 1.0
    """Shorter tracks are rejected."""
    max_track_seconds: float = 6 * 3600.0
    """Longer tracks are rejected."""
    max_clipped: float = 1.0
    """Tracks of which a larger share is clipped are rejected, see `Facts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What was found out about a track; None is what its header does not say."""

    format: str
    sample_rate: int
    channels: int
    seconds: float | None
    level: float | None = None
    """Root mean square in dBFS, of the mix, around its mean: a constant offset is no sound."""
    clipped: float | None = None
    """Share of samples at full scale that come after two others at full scale."""
    both: tuple[float, float] | None = None
    """Of a mix: the seconds between which both of its parts sound."""


def read_header(part: Part, intake: Intake) -> Facts:
    """What the header says, without reading the sound; raises as `decode` does."""
    with _opened(part) as opened:
        seconds, rate = part.duration, opened.sample_rate
        _check_header(part, opened, intake)
        if (count := _promised(part, opened)) is not None:
            _check_length(part, opened, count)
            seconds = count / rate
        if seconds is not None:
            _check_seconds(seconds, intake)
        return Facts(
            format=opened.format,
            sample_rate=rate,
            channels=opened.channels,
            seconds=seconds,
        )


def decode(part: Part, intake: Intake) -> Iterator[np.ndarray]:
    """Yields the samples in blocks [n, C] (float32), mixed and resampled; returns its `Facts`.

    However long the track is, a few blocks are in memory. Raises `RejectedError` as soon as the
    track is known not to be fit, which may be after its last block, FileNotFoundError, and OSError
    that `is_outage`.
    """
    with _opened(part) as opened:
        rate = opened.sample_rate
        _check_header(part, opened, intake)
        resampler = None
        if intake.sample_rate not in (None, rate):
            resampler = soxr.ResampleStream(
                rate, intake.sample_rate, intake.channels, dtype="float32", quality="VHQ"
            )
        count, clipped, total, square = 0, 0, np.zeros(intake.channels), 0.0
        values = 0  # samples of all channels
        # of the last two frames: whether they are at full scale
        before = np.zeros((2, opened.channels), bool)
        wanted = None if part.duration is None else round(part.duration * rate)
        for block in opened.read(round(part.start * rate), wanted):
            if not np.isfinite(block).all():
                raise RejectedError("not finite", "holds NaN or infinite samples")
            size = np.abs(block)
            if (peak := size.max()) > LARGEST_PEAK:
                raise RejectedError("too loud", f"a peak of {peak:.0f} where full scale is 1")
            if before.shape[1] != block.shape[1]:
                before = np.zeros((2, block.shape[1]), bool)
            full = np.concatenate([before, size >= opened.full_scale])
            clipped += np.count_nonzero(full[:-2] & full[1:-1] & full[2:])
            before = full[-2:]
            count, values = count + len(block), values + block.size
            if count > intake.max_track_seconds * rate:  # its header may not have told
                _check_seconds(count / rate, intake)
            block = mix(block, intake.channels)
            total += block.sum(0, dtype=np.float64)
            square += np.square(block, dtype=np.float64).sum()
            if resampler:
                block = resampler.resample_chunk(block)
            if len(block):
                yield block
        _check_length(part, opened, count)
        seconds = count / rate
        _check_seconds(seconds, intake)
        variance = max(0.0, square / (count * intake.channels) - np.mean(np.square(total / count)))
        level = 10 * math.log10(variance + 1e-20)
        if level < SILENCE_DBFS:
            what = f"mixed to {intake.channels} channels, without its constant part"
            raise RejectedError("silent", f"{level:.0f} dBFS, {what}")
        share = int(clipped) / values
        if share > intake.max_clipped:
            raise RejectedError("clipped", f"{share:.2%} of its samples")
    if resampler:
        rest = resampler.resample_chunk(np.zeros((0, intake.channels), np.float32), last=True)
        if len(rest):
            yield rest
    return Facts(
        format=opened.format,
        sample_rate=rate,
        channels=opened.channels,
        seconds=seconds,
        level=level,
        clipped=share,
    )


def open_bytes(place: FileBytes | RowBytes | HeldBytes) -> BinaryIO:
    """The bytes of a track's file, to read and seek in. Raises `RejectedError` and OSError."""
    if isinstance(place, HeldBytes):
        return io.BytesIO(place.data)
    if isinstance(place, RowBytes):
        return io.BytesIO(_row_bytes(place))
    if place.size is None:
        return open(place.path, "rb")  # noqa: SIM115
    return view(lambda: open(place.path, "rb"), place.offset, place.offset + place.size)


def _opened(part: Part) -> AbstractContextManager[Sound]:
    place = part.place
    named = isinstance(place, FileBytes) and place.size is None
    return open_sound(place.path, lambda: open_bytes(place), named=named)


def _check_header(part: Part, opened: Sound, intake: Intake) -> None:
    """Raises `RejectedError` for what the header alone decides."""
    if opened.loss and part.is_whole:
        raise RejectedError("cut off", opened.loss)
    check_channels(opened.channels, intake.channels)
    count = _promised(part, opened)
    if count is not None and count > intake.max_track_seconds * opened.sample_rate:
        _check_seconds(count / opened.sample_rate, intake)


def _check_seconds(seconds: float, intake: Intake) -> None:
    if seconds < intake.min_seconds:
        raise RejectedError("too short", f"{seconds:.3f} s")
    if seconds > intake.max_track_seconds:
        detail = f"{seconds:.0f} s at least, of {intake.max_track_seconds:g} at most"
        raise RejectedError("too long", detail)


def _promised(part: Part, opened: Sound) -> int | None:
    """Frames that a track has by the header of its file; None if that does not tell."""
    if opened.frames is None:
        return None
    count = max(0, opened.frames - round(part.start * opened.sample_rate))
    if part.duration is None:
        return count
    return min(count, round(part.duration * opened.sample_rate))


def _check_length(part: Part, opened: Sound, count: int) -> None:
    """Raises `RejectedError` if there is no sound, or less than was promised."""
    rate = opened.sample_rate
    if count == 0:
        if not part.is_whole:
            raise RejectedError("outside the file", f"the file ends before {part.start:g} s")
        raise RejectedError("empty", "no samples")
    if part.duration is not None and part.duration - count / rate > MISSING_SECONDS:
        detail = f"{count / rate:.2f} s from {part.start:g} s on, of {part.duration:g}"
        raise RejectedError("cut off", detail)


def _row_bytes(place: RowBytes) -> bytes:
    open_rows = {"parquet": _parquet_rows, "arrow": _arrow_rows}[place.kind]
    value = open_rows(place.path, place.column)[place.row].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise RejectedError("empty", "a row without audio")
    return data


# Tracks are read in the order of their rows, so that what is open serves the next one too.
@functools.lru_cache(maxsize=1)
def _arrow_rows(path: str, column: str) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(path)).read_all().column(column)


@functools.lru_cache(maxsize=1)
def _parquet_rows(path: str, column: str) -> "_ParquetRows":
    return _ParquetRows(path, column)


class _ParquetRows:
    """One column of a Parquet file. In rising order each is read once, a few are in memory."""

    def __init__(self, path: str, column: str):
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path, buffer_size=2**20)
        self._column = column
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))
        self._group = -1
        self._first, self._values, self._batches = 0, (), iter(())

    def __getitem__(self, row: int) -> Any:
        group = bisect_right(self._ends, row)
        if group == len(self._ends):
            raise RejectedError("unreadable", f"the table has no row {row}")
        if group != self._group or row < self._first:
            self._group = group
            self._first, self._values = self._ends[group - 1] if group else 0, ()
            self._batches = self._file.iter_batches(4, row_groups=[group], columns=[self._column])
        try:
            while row >= self._first + len(self._values):
                values = next(self._batches).column(self._column)
                self._first, self._values = self._first + len(self._values), values
        except Exception as error:
            self._group = -1  # what would come after damage is anyone's guess
            if isinstance(error, StopIteration):
                raise RejectedError("unreadable", f"the table ends before row {row}") from None
            raise
        return self._values[row - self._first]
