"""Audio intake: one track as samples, or why not.

`decode` is meant for a process of its own (tokenization/decoder.py): libraries that read other
people's files crash and hang.
"""

import errno
import functools
import io
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile
import soxr

# Files with these suffixes count as audio: soundfile's formats, less header-less samples, the
# other names that those formats go by, and what FFmpeg reads.
SUFFIXES = frozenset(f".{name.lower()}" for name in soundfile.available_formats()) - {".raw"} | {
    ".8svx", ".aif", ".aifc", ".iff", ".mat", ".mp2", ".nist", ".oga", ".opus", ".sf", ".snd",
    ".sph", ".wave",
    ".3gp", ".aac", ".ac3", ".ape", ".m4a", ".m4b", ".mka", ".mkv", ".mov", ".mp4", ".tta", ".webm",
    ".wma", ".wv",
}  # fmt: skip
SILENCE_DBFS = -60.0
LARGEST_PEAK = 8.0  # full scale is 1; samples of +-32768 are no float audio
LOWEST_RATE, HIGHEST_RATE = 1000, 1_000_000  # in Hz; what is beyond comes of damaged headers
CLIPPED = 1e-3  # a track of which a larger share is clipped counts as clipped

# What the machine, its network and its mounts have, and no file by itself.
_OUTAGES = frozenset(
    {
        errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ECONNREFUSED,
        errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
        errno.ENETUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    }
)  # fmt: skip
_BLOCK = 2**17  # frames read at once
# Compressed formats may miss their header's length by a few of their own frames.
_MISSING_SECONDS = 0.1
# libsndfile's log, where a header promises more bytes or samples than the file has
_CUT_OFF = [
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        # WAV; AIFF; AU; 8SVX; W64 (WAV's own, in capitals, tells nothing of the sound)
        r"^\s*(?:data|SSND|Data Size|BODY|riff)\s*: "
        r"(?P<declared>\d+) \(should be (?P<actual>\d+)\)",
        # RF64
        r"frame count (?P<actual>\d+) does not match value from 'ds64' chunk of (?P<declared>\d+)",
        r"seems to be truncated\. (?P<actual>\d+) <--> (?P<declared>\d+)",  # MAT4
        r"^Data length (?P<declared>\d+) should be (?P<actual>\d+)",  # WVE
    )
]
_CUT_OFF_SOMEWHERE = "Seems to be a truncated file."  # VOC
_UNKNOWN_LENGTH = 2**31 - 2**16  # streamed files promise about 2**31 or 2**32 bytes
_LARGEST_OGG_PAGE = 27 + 255 + 255 * 255
_FIRST_MP3_FRAME = 2**13  # bytes that hold it, where a header may note how long the sound is
# What FFmpeg may take a file for: no playlists and no pictures, which lead to other files.
_FFMPEG_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,caf,eac3,flac,flv,loas,matroska,mov,mp3,mpeg,mpegts,ogg,tta,wav,wv"
)
_FFMPEG_TIMED = ("mov", "matroska", "asf")  # their headers note how long the sound is
_MPEG = ("mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float")  # FFmpeg's decoders
_SEEK_AHEAD = 1.0  # seconds that a decoder gets to settle after a seek


class RejectedError(Exception):
    """A track that is left out, with a `Reject`'s reason and detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class _MisreadError(Exception):
    """A file of which libsndfile would give the beginning as the whole.

    joined: it is one file behind another, and times within are not those of the whole.
    """

    def __init__(self, *, joined: bool):
        super().__init__(joined)
        self.joined = joined


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
class Track:
    """Captioned audio that has not been opened yet: a file or a part of one."""

    path: str
    """Below the source's root, for people and records."""
    track_id: str
    """Unlike that of any other track of the source; by default the path without suffix."""
    place: FileBytes | RowBytes | HeldBytes
    captions: tuple[str, ...]
    """One at least, and the first is the caption."""
    fields: str
    """JSON object of whatever else goes with it, less what is null or not finite."""
    start: float = 0.0
    """Seconds into the file."""
    duration: float | None = None
    """Seconds; None is up to the end of the file."""

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


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A file whose header has been read."""

    format: str
    sample_rate: int
    channels: int
    full_scale: float
    frames: int | None
    """Of the whole file by its header."""
    loss: str | None
    """What is missing of the whole file by its header."""
    read: Callable[[int, int | None], Iterator[np.ndarray]]
    """Frames to pass over and at most to read (None: all) -> blocks [n, channels], float32."""


def read_header(track: Track, intake: Intake) -> Facts:
    """What the header says, without reading the sound; raises as `decode` does."""
    with _opened(track) as opened:
        seconds, rate = track.duration, opened.sample_rate
        _check_header(track, opened, intake)
        if (count := _promised(track, opened)) is not None:
            _check_length(track, opened, count)
            seconds = count / rate
        if seconds is not None:
            _check_seconds(seconds, intake)
        return Facts(
            format=opened.format,
            sample_rate=rate,
            channels=opened.channels,
            seconds=seconds,
        )


def decode(track: Track, intake: Intake) -> Iterator[np.ndarray]:
    """Yields the samples in blocks [n, C] (float32), mixed and resampled; returns its `Facts`.

    However long the track is, a few blocks are in memory. Raises `RejectedError` as soon as the
    track is known not to be fit, which may be after its last block, FileNotFoundError, and OSError
    that `is_outage`.
    """
    with _opened(track) as opened:
        rate = opened.sample_rate
        _check_header(track, opened, intake)
        resampler = None
        if intake.sample_rate not in (None, rate):
            resampler = soxr.ResampleStream(
                rate, intake.sample_rate, intake.channels, dtype="float32", quality="VHQ"
            )
        count, clipped, total, square = 0, 0, np.zeros(intake.channels), 0.0
        # of the last two frames: whether they are at full scale
        before = np.zeros((2, opened.channels), bool)
        wanted = None if track.duration is None else round(track.duration * rate)
        for block in opened.read(round(track.start * rate), wanted):
            if not np.isfinite(block).all():
                raise RejectedError("not finite", "holds NaN or infinite samples")
            size = np.abs(block)
            if (peak := size.max()) > LARGEST_PEAK:
                raise RejectedError("too loud", f"a peak of {peak:.0f} where full scale is 1")
            full = np.concatenate([before, size >= opened.full_scale])
            clipped += np.count_nonzero(full[:-2] & full[1:-1] & full[2:])
            before = full[-2:]
            count += len(block)
            if count > intake.max_track_seconds * rate:  # (its header may not have told)
                _check_seconds(count / rate, intake)
            block = mix(block, intake.channels)
            total += block.sum(0, dtype=np.float64)
            square += np.square(block, dtype=np.float64).sum()
            if resampler:
                block = resampler.resample_chunk(block)
            if len(block):
                yield block
        _check_length(track, opened, count)
        seconds = count / rate
        _check_seconds(seconds, intake)
        variance = max(0.0, square / (count * intake.channels) - np.mean(np.square(total / count)))
        level = 10 * math.log10(variance + 1e-20)
        if level < SILENCE_DBFS:
            what = f"mixed to {intake.channels} channels, without its constant part"
            raise RejectedError("silent", f"{level:.0f} dBFS, {what}")
        share = int(clipped) / (count * opened.channels)
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


def mix(block: np.ndarray, channels: int) -> np.ndarray:
    """[n, any] to [n, channels], as AudioCraft's `convert_audio_channels`.

    To mono the mean of all, from mono the same in each, otherwise the first ones. Raises
    `RejectedError` for too few.
    """
    _check_channels(block.shape[1], channels)
    if block.shape[1] == channels:
        return block
    if channels == 1:
        return block.mean(1, keepdims=True)
    if block.shape[1] == 1:
        return np.repeat(block, channels, axis=1)
    return np.ascontiguousarray(block[:, :channels])


def _check_channels(given: int, wanted: int) -> None:
    if 1 < given < wanted:
        raise RejectedError("too few channels", f"{given} channels where 1 or {wanted} go")


def open_bytes(place: FileBytes | RowBytes | HeldBytes) -> BinaryIO:
    """The bytes of a track's file, to read and seek in. Raises `RejectedError` and OSError."""
    if isinstance(place, HeldBytes):
        return io.BytesIO(place.data)
    if isinstance(place, RowBytes):
        return io.BytesIO(_row_bytes(place))
    if place.size is None:
        return open(place.path, "rb")  # noqa: SIM115
    return io.BufferedReader(_Range(place.path, place.offset, place.size), _BLOCK)


def is_outage(error: OSError) -> bool:
    """Whether a file could not be had through no fault of its own, so that it is no reject.

    EIO counts where a file could not be opened, as when the bucket behind a mount is out of reach:
    such errors have its name. Within a file it is the disk's damage.
    """
    return error.errno in _OUTAGES or (error.errno == errno.EIO and error.filename is not None)


def part_of(track: Track) -> str:
    """For the details of rejects: which part of its file a track is; '' for a whole one."""
    return f" ({track.track_id})" if _is_part(track) else ""


def _is_part(track: Track) -> bool:
    return track.start > 0 or track.duration is not None


def _check_header(track: Track, opened: _Opened, intake: Intake) -> None:
    """Raises `RejectedError` for what the header alone decides."""
    if opened.loss and not _is_part(track):
        raise RejectedError("cut off", opened.loss)
    _check_channels(opened.channels, intake.channels)
    count = _promised(track, opened)
    if count is not None and count > intake.max_track_seconds * opened.sample_rate:
        _check_seconds(count / opened.sample_rate, intake)


def _check_seconds(seconds: float, intake: Intake) -> None:
    if seconds < intake.min_seconds:
        raise RejectedError("too short", f"{seconds:.3f} s")
    if seconds > intake.max_track_seconds:
        detail = f"{seconds:.0f} s at least, of {intake.max_track_seconds:g} at most"
        raise RejectedError("too long", detail)


def _promised(track: Track, opened: _Opened) -> int | None:
    """Frames that a track has by the header of its file; None if that does not tell."""
    if opened.frames is None:
        return None
    count = max(0, opened.frames - round(track.start * opened.sample_rate))
    if track.duration is None:
        return count
    return min(count, round(track.duration * opened.sample_rate))


def _check_length(track: Track, opened: _Opened, count: int) -> None:
    """Raises `RejectedError` if there is no sound, or less than was promised."""
    rate = opened.sample_rate
    if count == 0:
        if _is_part(track):
            raise RejectedError("outside the file", f"the file ends before {track.start:g} s")
        raise RejectedError("empty", "no samples")
    if track.duration is not None:
        if track.duration - count / rate > _MISSING_SECONDS:
            detail = f"{count / rate:.2f} s from {track.start:g} s on, of {track.duration:g}"
            raise RejectedError("cut off", detail)
    elif opened.frames is not None:
        begin = round(track.start * rate)
        if opened.frames - begin - count > _MISSING_SECONDS * rate:
            detail = f"{count} samples where the header says {opened.frames - begin}"
            raise RejectedError("cut off", detail)


@contextmanager
def _opened(track: Track) -> Iterator[_Opened]:
    """Opens a track's file with libsndfile, or with FFmpeg if that would not read all of it."""
    with ExitStack() as stack:
        try:
            with open_bytes(track.place) as file:
                if file.seek(0, os.SEEK_END) == 0:
                    raise RejectedError("empty", "a file of 0 bytes")
            try:
                opened = stack.enter_context(_open_sndfile(track))
            except soundfile.LibsndfileError:
                opened = stack.enter_context(_open_ffmpeg(track))
            except _MisreadError as error:
                opened = stack.enter_context(_open_ffmpeg(track, seeks=not error.joined))
            if not LOWEST_RATE <= opened.sample_rate <= HIGHEST_RATE:
                raise RejectedError("odd sample rate", f"{opened.sample_rate} Hz")
            yield opened
        except FileNotFoundError:
            raise
        except (
            soundfile.SoundFileError, OSError, ValueError, RuntimeError, ArithmeticError
        ) as error:  # fmt: skip
            if isinstance(error, OSError) and is_outage(error):
                raise
            detail = getattr(error, "error_string", None) or getattr(error, "strerror", None)
            # (messages may hold the whole path, which differs between machines)
            name = os.path.basename(track.place.path)
            detail = (detail or str(error)).replace(track.place.path, name)
            raise RejectedError("unreadable", detail) from None


@contextmanager
def _open_sndfile(track: Track) -> Iterator[_Opened]:
    place = track.place
    with ExitStack() as stack:
        # (a name helps libsndfile to tell a few old formats)
        if isinstance(place, FileBytes) and place.size is None:
            source = place.path
        else:
            source = stack.enter_context(open_bytes(place))
        file = stack.enter_context(soundfile.SoundFile(source))
        _check_all_is_read(track, file)

        def read(skip: int, wanted: int | None) -> Iterator[np.ndarray]:
            if skip:
                if skip >= file.frames:
                    return
                file.seek(skip)
            left = wanted
            while left is None or left > 0:
                size = _BLOCK if left is None else min(left, _BLOCK)
                block = file.read(size, dtype="float32", always_2d=True)
                if not len(block):
                    return
                left = None if left is None else left - len(block)
                yield block

        coarse = file.subtype in ("PCM_S8", "PCM_U8")
        yield _Opened(
            format=file.format if file.format in ("MP3", "FLAC") else _format_name(file),
            sample_rate=file.samplerate,
            channels=file.channels,
            full_scale=0.99 if coarse else 0.9999,  # 127/128, and 32767/32768
            frames=file.frames if file.frames < 2**62 else None,
            loss=_cut_off(track, file),
            read=read,
        )


def _format_name(file: soundfile.SoundFile) -> str:
    subtype = file.subtype.removeprefix("PCM_").lower()
    return f"{file.format} {subtype} bit" if subtype.isdigit() else f"{file.format} {subtype}"


@contextmanager
def _open_ffmpeg(track: Track, *, seeks: bool = True) -> Iterator[_Opened]:
    import av

    # (a file of another format that is renamed must lead nowhere)
    options = {"format_whitelist": _FFMPEG_FORMATS, "protocol_whitelist": ""}
    try:
        with (
            open_bytes(track.place) as file,
            av.open(file, options=options, metadata_errors="replace") as container,
        ):
            if not container.streams.audio:
                raise RejectedError("unreadable", "no sound in it")
            stream = container.streams.audio[0]
            decoded = container.decode
            if stream.codec_context.name in _MPEG:
                decoded = functools.partial(_mpeg_frames, container)
            frames = decoded(stream)
            # (a header may name another rate than the sound has, as that of HE-AAC does)
            first = next(frames, None)
            if first is None:
                raise RejectedError("empty", "no samples")
            rate, origin = first.sample_rate, first.time or 0.0

            def blocks(frames: Iterable[Any], begin: int, skip: int, wanted: int | None) -> Any:
                try:
                    yield from _float_blocks(frames, begin, skip, wanted)
                except av.FFmpegError as error:
                    if file.tell() == file.seek(0, os.SEEK_END):
                        raise RejectedError("cut off", "ends within a packet") from None
                    raise RejectedError("unreadable", error.strerror) from None

            def read(skip: int, wanted: int | None) -> Iterator[np.ndarray]:
                if skip <= _SEEK_AHEAD * rate or not seeks:
                    return blocks(chain([first], frames), 0, skip, wanted)
                container.seek(int((origin + skip / rate - _SEEK_AHEAD) * av.time_base))
                after = decoded(stream)
                landed = next(after, None)
                if landed is None:
                    return iter(())
                begin = round((landed.time - origin) * rate)
                return blocks(chain([landed], after), begin, skip, wanted)

            container_name = container.format.name.split(",")[0]
            seconds = _ffmpeg_seconds(container, stream)
            yield _Opened(
                format=f"{stream.codec_context.name} in {container_name}",
                sample_rate=rate,
                channels=first.layout.nb_channels,
                full_scale=0.9999,
                frames=None if seconds is None else round(seconds * rate),
                loss=_cut_off_ogg(track) if container_name == "ogg" else None,
                read=read,
            )
    except av.FFmpegError as error:
        detail = f"neither libsndfile nor FFmpeg reads it ({error.strerror})"
        raise RejectedError("unreadable", detail) from None


def _mpeg_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of MP3, which may have padding and tags before them, behind them and between files.

    What cannot be decoded before the first frame or after the last is no sound, nor is a tag.
    """
    import av

    begun, damage = False, None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError as error:
            if begun and bytes(packet)[:3] not in (b"ID3", b"TAG", b"APE"):
                damage = error
            continue
        if frames and damage:
            raise damage
        begun = begun or bool(frames)
        yield from frames


def _ffmpeg_seconds(container: Any, stream: Any) -> float | None:
    """How long the sound is by the header, where it notes that; elsewhere FFmpeg guesses."""
    import av

    if container.format.name.split(",")[0] not in _FFMPEG_TIMED:
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    cover = av.stream.Disposition.attached_pic
    if all(video.disposition & cover for video in container.streams.video):
        return None if container.duration is None else container.duration / av.time_base
    return None  # that of the picture may be another


def _float_blocks(
    frames: Iterable[Any], position: int, skip: int, wanted: int | None
) -> Iterator[np.ndarray]:
    """Blocks [n, channels] of FFmpeg's frames, of which the first begins at `position`."""
    import av

    to_float = av.AudioResampler(format="fltp")
    blocks, held, left = [], 0, wanted
    for frame in frames:
        for part in to_float.resample(frame):
            samples = part.to_ndarray().T
            drop = min(max(0, skip - position), len(samples))
            position += len(samples)
            samples = samples[drop:] if left is None else samples[drop : drop + left]
            if len(samples):
                blocks.append(samples)
                held += len(samples)
                left = None if left is None else left - len(samples)
        if held >= _BLOCK:
            yield np.concatenate(blocks)
            blocks, held = [], 0
        if left == 0:
            break
    if held:
        yield np.concatenate(blocks)


def _cut_off(track: Track, file: soundfile.SoundFile) -> str | None:
    """What is missing of an open file by its headers, or None; not all formats can tell."""
    log = file.extra_info
    for pattern in _CUT_OFF:
        for match in pattern.finditer(log):
            declared, actual = int(match["declared"]), int(match["actual"])
            # (the number of samples is libsndfile's own, of the bytes that are there)
            missing = file.frames / file.samplerate * (declared / max(actual, 1) - 1)
            if declared < _UNKNOWN_LENGTH and missing > _MISSING_SECONDS:
                return f"its header says {declared}, and there are {actual}"
    if _CUT_OFF_SOMEWHERE in log:
        return "shorter than its header says"
    return _cut_off_ogg(track) if file.format == "OGG" else None


def _cut_off_ogg(track: Track) -> str | None:
    page = _last_ogg_page(track)
    # header of 27 bytes: [5] flags, of which 4 ends the stream; [14:18] number of the stream;
    # [26] number of segments, whose lengths follow
    if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        return "ends within a page"
    if not page[5] & 4:
        return "the page that ends the stream is missing"
    return None


def _last_ogg_page(track: Track) -> bytes:
    with open_bytes(track.place) as raw:
        size = raw.seek(0, os.SEEK_END)
        raw.seek(max(0, size - _LARGEST_OGG_PAGE))
        end = raw.read()
    return end[max(0, end.rfind(b"OggS\0")) :]


def _check_all_is_read(track: Track, file: soundfile.SoundFile) -> None:
    """Raises `_MisreadError` if libsndfile would stop before the end of a file."""
    if file.format == "OGG":  # of several streams, chained or side by side, it reads the first
        with open_bytes(track.place) as raw:
            first, last = raw.read(18), _last_ogg_page(track)
        whole = len(last) >= 18 and first[:4] == last[:4] == b"OggS"
        if whole and first[14:18] != last[14:18]:
            raise _MisreadError(joined=True)
    elif file.subtype.startswith("MPEG_LAYER"):  # it reads so much as the first frame tells
        with open_bytes(track.place) as raw:
            at = 0
            # tags of ID3v2: 10 bytes, of which the last four hold the length, 7 bits in each
            while (head := raw.read(10))[:3] == b"ID3" and len(head) == 10:
                at += 10 + sum(byte << 7 * i for i, byte in enumerate(reversed(head[6:])))
                raw.seek(at)
            raw.seek(at)
            frame = raw.read(_FIRST_MP3_FRAME)
            size = raw.seek(0, os.SEEK_END) - at
        # flags of four bytes: 1 means that the number of frames follows, 2 that of bytes
        found = re.search(rb"(?:Xing|Info)\0\0\0([\0-\x0f])(.{4})(.{4})", frame, re.DOTALL)
        if not found or not found[1][0] & 1:  # a guess, by the bit rate of that frame
            raise _MisreadError(joined=False)
        if found[1][0] & 2 and size - found.start() > 1.01 * int.from_bytes(found[3]):
            raise _MisreadError(joined=True)


class _Range(io.RawIOBase):
    """A range of a file's bytes as a file."""

    _file: int | None = None

    def __init__(self, path: str, offset: int, size: int):
        self._file = os.open(path, os.O_RDONLY)
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._position))
        data = os.pread(self._file, wanted, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        super().close()


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
