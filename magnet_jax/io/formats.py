"""Reading sound files of any format: the whole sound at its own speed, or the reason why not.

libsndfile reads what holds plain samples, FFmpeg the rest. Both believe what a header says of the
sound's length; here it is held against what the file has.
"""

import errno
import functools
import io
import itertools
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ahocorasick_rs
import numpy as np
import soxr

# Files with these suffixes count as audio: soundfile's formats, less header-less samples, the
# other names that those formats go by, and what FFmpeg reads.
SUFFIXES = frozenset({
    ".aiff", ".au", ".avr", ".caf", ".flac", ".htk", ".ircam", ".mat4", ".mat5", ".mp3", ".mpc2k",
    ".ogg", ".paf", ".pvf", ".rf64", ".sd2", ".sds", ".svx", ".voc", ".w64", ".wav", ".wavex",
    ".wve", ".xi",
    ".8svx", ".aif", ".aifc", ".bw64", ".bwf", ".iff", ".mat", ".mp2", ".nist", ".oga", ".ogx",
    ".opus", ".sf", ".snd", ".sph", ".spx", ".wave",
    ".3g2", ".3gp", ".aac", ".ac3", ".adts", ".adx", ".amr", ".ape", ".asf", ".avi", ".awb", ".dsf",
    ".dts", ".dtshd", ".eac3", ".ec3", ".f4a", ".f4v", ".flv", ".gsm", ".latm", ".loas", ".m2ts",
    ".m4a", ".m4b", ".m4r", ".m4v", ".mka", ".mkv", ".mlp", ".mov", ".mp1", ".mp4", ".mpa", ".mpc",
    ".mpeg", ".mpg", ".mts", ".nut", ".ogv", ".oma", ".qt", ".ra", ".rm", ".rmvb", ".shn", ".sox",
    ".tak", ".thd", ".truehd", ".ts", ".tta", ".vob", ".weba", ".webm", ".wma", ".wmv", ".wv",
})  # fmt: skip
LOWEST_RATE, HIGHEST_RATE = 1000, 1_000_000  # in Hz; what is beyond comes of damaged headers
BLOCK = 2**17  # frames read at once
# Compressed formats may miss their header's length by a few of their own frames.
MISSING_SECONDS = 0.1

# What the machine, its network and its mounts have, and no file by itself.
_OUTAGES = frozenset(
    {
        errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ECONNREFUSED,
        errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
        errno.ENETUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    }
)  # fmt: skip
# What FFmpeg may take a file for: no playlists and no pictures, which lead to other files.
_FFMPEG_FORMATS = (
    "aac,ac3,adx,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,gsm,iff,loas,"
    "matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,nut,ogg,oma,rm,shn,sox,tak,truehd,tta,voc,w64,wav,wv"
)
# Their headers note the time at which the sound ends. There may be gaps within.
_TIMED = ("asf", "flv", "matroska", "mov")
_ENDED = ("asf", "matroska", "opus in ogg")  # and not how much comes before it
# Their headers note how many samples there are.
_COUNTED = ("ape", "flac", "mpc", "mpc8", "ogg", "tta")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_HEAD = 2**16  # bytes that hold the headers of ASF, FLV and Matroska
_SEGMENT = bytes.fromhex("18538067")
_SEGMENT_INFO = re.compile(rb"\x15\x49\xa9\x66(?!\x53\xac)")  # and not its name in an index
_DURATION = re.compile(rb"\x44\x89(?=\x84.{4}|\x88.{8})[\x84\x88](.{4})", re.DOTALL)
_FLV_SIZE = b"filesize\0"
_FLAC_ROUNDING = 2e-4  # seconds
_NAMES = {"flac": "FLAC", "mp3": "MP3"}
_MPEG = ("mp1", "mp2", "mp3")
_SEEK_AHEAD = 1.0  # seconds that a decoder gets to settle after a seek
_LARGEST_OGG_PAGE = 27 + 255 + 255 * 255
_LARGEST_REST = 2**15  # bytes behind an MP3 that may be any
_FIRST_MP3_FRAME = 2**13  # bytes that hold it, where a header may note how long the sound is


class RejectedError(Exception):
    """A sound that cannot be read whole, with a fixed phrase to count by, and a detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A file whose header has been read."""

    format: str
    sample_rate: int
    channels: int
    """Of the beginning."""
    full_scale: float
    frames: int | None
    """Of the whole file by its header; None if that does not tell."""
    loss: str | None
    """What is missing of the whole file by its header."""
    read: Callable[[int, int | None], Iterator[np.ndarray]]
    """Frames to pass over and at most to read (None: all) -> blocks [n, channels], float32.

    To be called once. A file may change its number of channels, and blocks do so with it. Raises
    `RejectedError` where
    the sound ends too early or cannot be decoded.
    """


@contextmanager
def open_sound(
    path: str, open_file: Callable[[], BinaryIO] | None = None, *, named: bool = True
) -> Iterator[Sound]:
    """Opens a sound; whatever cannot be read, now or later, is a `RejectedError`.

    Args:
      path: file that the sound lies in.
      open_file: opens the sound's bytes; None opens the file.
      named: whether the sound is the file itself, and not a part of it.

    Raises:
      RejectedError, FileNotFoundError, and OSError that `is_outage`.
    """
    open_file = open_file or functools.partial(open, path, "rb")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_file())
            if file.seek(0, os.SEEK_END) == 0:
                raise RejectedError("empty", "a file of 0 bytes")
            sound = _open(path, open_file, named, file, stack)
            if not LOWEST_RATE <= sound.sample_rate <= HIGHEST_RATE:
                raise RejectedError("odd sample rate", f"{sound.sample_rate} Hz")
            yield replace(sound, read=functools.partial(_as_sound, sound.read))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RuntimeError, ArithmeticError) as error:  # libsndfile's too
            if isinstance(error, OSError) and is_outage(error):
                raise
            detail = getattr(error, "error_string", None) or getattr(error, "strerror", None)
            # Messages may hold the whole path, which differs between machines.
            detail = (detail or str(error)).replace(path, Path(path).name)
            raise RejectedError("unreadable", detail) from None


def read_whole(path: str, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """A file, or so much of its beginning, as [C, N] (float32), and its sample rate.

    Raises `RejectedError`, and OSError for what is not there or out of reach.
    """
    with open_sound(path) as sound:
        if sound.loss:
            raise RejectedError("cut off", sound.loss)
        wanted = None if seconds is None else round(seconds * sound.sample_rate)
        blocks = list(sound.read(0, wanted))
        if not blocks:
            raise RejectedError("empty", "no samples")
        channels = max(block.shape[1] for block in blocks)
        wav_NC = np.concatenate([mix(block, channels) for block in blocks])
        return np.ascontiguousarray(wav_NC.T), sound.sample_rate


def mix(block: np.ndarray, channels: int) -> np.ndarray:
    """[n, any] to [n, channels], as AudioCraft's `convert_audio_channels`.

    To mono the mean of all, from mono the same in each, otherwise the first ones. Raises
    `RejectedError` for too few.
    """
    check_channels(block.shape[1], channels)
    if block.shape[1] == channels:
        return block
    if channels == 1:
        if block.shape[1] == 2:  # the same to the last bit, in a tenth of the time
            return (block[:, :1] + block[:, 1:]) * np.float32(0.5)
        return block.mean(1, keepdims=True)
    if block.shape[1] == 1:
        return np.repeat(block, channels, axis=1)
    return np.ascontiguousarray(block[:, :channels])


def check_channels(given: int, wanted: int) -> None:
    if 1 < given < wanted:
        raise RejectedError("too few channels", f"{given} channels where 1 or {wanted} go")


def is_outage(error: OSError) -> bool:
    """Whether a file could not be had through no fault of its own, so that it is no reject.

    EIO counts where a file could not be opened, as when the bucket behind a mount is out of reach:
    such errors have its name. Within a file it is the disk's damage.
    """
    return error.errno in _OUTAGES or (error.errno == errno.EIO and error.filename is not None)


def _open(
    path: str, open_file: Callable[[], BinaryIO], named: bool, file: BinaryIO, stack: ExitStack
) -> Sound:
    """Opens a sound with the library that reads all of it."""
    size = file.seek(0, os.SEEK_END)
    if begin := _before_sound(file):
        if begin > size:
            raise RejectedError("cut off", "ends within its tag")
        if begin == size:
            raise RejectedError("empty", "a tag and no sound")
        return _open_part(path, functools.partial(view, open_file, begin, size), stack)
    file.seek(0)
    head = file.read(4)
    if head == b"OggS":
        return _open_ogg(open_file, file, stack)
    if _STREAM.match(head):
        return _open_stream(path, open_file, file, stack)
    samples = find_samples(file)
    if (at := _second_header(file, samples)) is not None:
        first, second = (
            functools.partial(_open_part, path, functools.partial(view, open_file, *part))
            for part in ((0, at), (at, size))
        )
        return _chained(first(stack), [second])
    if samples and samples.mended:
        open_file, named = functools.partial(view, open_file, *samples.mended), False
    sound = None
    if not (samples and samples.too_large):
        # A name helps libsndfile to tell a few old formats.
        sound = _open_sndfile(path if named else stack.enter_context(open_file()), stack)
    if sound is None:
        sound = _open_ffmpeg(open_file, stack)
    elif sound.format.startswith("VOC"):  # of its blocks libsndfile knows the first
        sound = replace(_open_ffmpeg(open_file, stack), loss=_voc_loss(file))
    if sound.format.endswith((" in avi", " in matroska")):
        of_parts = _avi_loss if sound.format.endswith("avi") else _matroska_loss
        sound = replace(sound, loss=of_parts(file))
    return replace(sound, loss=_loss(samples, sound)) if samples else sound


def _open_part(path: str, open_file: Callable[[], BinaryIO], stack: ExitStack) -> Sound:
    return _open(path, open_file, False, stack.enter_context(open_file()), stack)


def _chained(first: Sound, others: Iterable[Callable[[ExitStack], Sound]]) -> Sound:
    """Several sounds one behind the other, at the rate of the first."""

    def parts() -> Iterator[tuple[int, np.ndarray]]:
        yield from ((first.sample_rate, block) for block in first.read(0, None))
        for opener in others:
            with ExitStack() as inner:
                sound = opener(inner)
                if sound.loss:
                    raise RejectedError("cut off", sound.loss)
                yield from ((sound.sample_rate, block) for block in sound.read(0, None))

    def read(skip: int, wanted: int | None) -> Iterator[np.ndarray]:
        return _cut_out(_at_rate(first.sample_rate, parts()), skip, wanted)

    return replace(first, frames=None, read=read)


def _before_sound(file: BinaryIO) -> int:
    """How many bytes a file begins with that are tags of ID3v2, or zeros before an MP3."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(10)
        more = _tag_size(head) or (_padding(file, at) if head[:4] == bytes(4) else 0)
        if not more:
            return at
        at += more


def _tag_size(head: bytes) -> int:
    """Bytes of a tag of ID3v2, of which these are the first ten; 0 if they are none."""
    if not re.match(rb"ID3[^\xff][^\xff].[\0-\x7f]{4}", head, re.DOTALL):
        return 0
    size = sum(byte << 7 * i for i, byte in enumerate(reversed(head[6:10])))
    return 10 + size + (10 if head[5] & 16 else 0)  # (the flag is of ten more at the end)


def _padding(file: BinaryIO, at: int) -> int:
    """How many zeros come from there on before the first frame of an MP3; 0 for other files."""
    begin = at
    file.seek(at)
    while data := file.read(BLOCK):
        if rest := data.lstrip(b"\0"):
            at += len(data) - len(rest)
            return at - begin if re.match(rb"\xff[\xe2-\xff]|ID3", rest) else 0
        at += len(data)
    return 0


# --- files one behind the other -------------------------------------------------------------------

_KINDS = (b"WAVE", b"AIFF", b"AIFC", b"8SVX", b"16SV")  # of RIFF and FORM
# How files begin: a word to look for, and the whole beginning, which is around it.
_BEGINNINGS = {
    word: re.compile(pattern, re.DOTALL)
    for word, pattern in {
        b"fLaC": rb"fLaC[\0\x80]\0\0\x22",
        b"RIFF": rb"RIFF.{4}WAVE",
        b"RIFX": rb"RIFX.{4}WAVE",
        b"RF64": rb"RF64.{4}WAVE",
        b"BW64": rb"BW64.{4}WAVE",
        b"FORM": rb"FORM.{4}(?:AIFF|AIFC|8SVX|16SV)",
        b"caff": rb"caff\0\x01\0\0",
        b"OggS": rb"OggS\0\x02\0{8}",
        b"ftyp": rb"\0\0\0.ftyp[ -~]{4}",
        # of WavPack the first block with samples; others may belong to it (the last bit tells)
        b"wvpk": rb"wvpk.{4}[\x02-\x10]\x04.{6}\0{4}(?!\0{4}).{5}[%s]"
        % b"".join(rb"\x%x8-\x%xf" % (i, i) for i in range(16)),
        b"ID3": rb"ID3[\x02-\x04]\0.[\0-\x7f]{4}",
        # the first frame of most MP3s
        b"Xing": rb"\xff[\xe2-\xfb].{2,4}\0{9,32}Xing\0{3}[\x01-\x0f]",
        b"Info": rb"\xff[\xe2-\xfb].{2,4}\0{9,32}Info\0{3}[\x01-\x0f]",
    }.items()
}
_LONGEST_BEGINNING = 64
_STREAM = re.compile(rb"fLaC|\xff[\xe0-\xff]")  # formats that are read from front to end
# What is looked for behind these; each word takes time. An MP3 is one sound with the MP3s and tags
# behind it.
_BEHIND_FLAC = {w: p for w, p in _BEGINNINGS.items() if w not in (b"RIFX", b"RF64", b"BW64")}
_BEHIND_MPEG = {w: p for w, p in _BEHIND_FLAC.items() if w not in (b"ID3", b"Xing", b"Info")}


@functools.cache
def _automaton(words: tuple[bytes, ...]) -> ahocorasick_rs.BytesAhoCorasick:
    """Finds whether any of the words lies in a block, ten times as fast as one after the other."""
    kind = ahocorasick_rs.MatchKind.LeftmostFirst  # the fast one, which skips what overlaps
    return ahocorasick_rs.BytesAhoCorasick(words, matchkind=kind)


def _next_file(
    file: BinaryIO, begin: int, end: int, beginnings: dict[bytes, re.Pattern] = _BEGINNINGS
) -> int | None:
    """Where between two places another file begins; None if none does."""
    automaton = _automaton(tuple(beginnings))
    for at in range(begin, end, BLOCK):
        size = min(BLOCK, end - at)
        file.seek(at)
        data = file.read(size + _LONGEST_BEGINNING)
        if not automaton.find_matches_as_indexes(data):
            continue
        found = [
            start
            for word, pattern in beginnings.items()
            for start in _starts(data, word, pattern)
            if start < size and (word != b"ID3" or _is_before_mp3(file, at + start))
        ]
        if found:
            return at + min(found)
    return None


def _starts(data: bytes, word: bytes, pattern: re.Pattern) -> Iterator[int]:
    here = data.find(word)
    while here >= 0:
        around = max(0, here - _LONGEST_BEGINNING), here + _LONGEST_BEGINNING
        if match := pattern.search(data, *around):
            yield match.start()
        here = data.find(word, here + 1)


def _is_before_mp3(file: BinaryIO, at: int) -> bool:
    """Whether the tag there is that of an MP3, and does not belong to what comes before."""
    file.seek(at)
    file.seek(at + _tag_size(file.read(10)))
    return bool(re.match(rb"\xff[\xe2-\xfb]", file.read(2)))


_Watch = Callable[[int, int], int | None]


def _watch(file: BinaryIO, at: int, found: list[int]) -> _Watch:
    """Notes where between two places, once they are read, a file begins behind the one there."""
    begin, beginnings = at + 1, _BEHIND_MPEG
    file.seek(at)
    if file.read(4) == b"fLaC":
        begin, beginnings, last = at + 4, _BEHIND_FLAC, False
        while not last:  # before its sound come pictures, and headers of other formats
            file.seek(begin)
            head = file.read(4)
            last = len(head) < 4 or head[0] >= 128
            begin += 4 + int.from_bytes(head[1:])

    def watch(first: int, last: int) -> int | None:
        place = _next_file(file, max(first, begin), last, beginnings)
        found.extend([] if place is None else [place])
        return place

    return watch


def _open_stream(
    path: str, open_file: Callable[[], BinaryIO], file: BinaryIO, stack: ExitStack
) -> Sound:
    """What is read from front to end. Files that lie behind show when that is reached."""
    size = file.seek(0, os.SEEK_END)
    found: list[int] = []

    def others() -> Iterator[Callable[[ExitStack], Sound]]:
        while found:
            at = min(found)
            found.clear()
            file.seek(at)
            if not _STREAM.match(file.read(4)):
                rest = functools.partial(view, open_file, at, size)
                yield functools.partial(_open_part, path, rest)
                return
            part = functools.partial(view, open_file, at, size, watch=_watch(file, at, found))
            yield functools.partial(_open_ffmpeg, part)

    watch = _watch(file, 0, found)
    first = _open_ffmpeg(functools.partial(view, open_file, 0, size, watch=watch), stack)

    def read(skip: int, wanted: int | None) -> Iterator[np.ndarray]:
        if skip and watch(0, size) is None:
            return first.read(skip, wanted)
        return _chained(first, others()).read(skip, wanted)

    return replace(first, read=read)


# --- headers that tell of another length than the sound has ---------------------------------------


class _Samples(NamedTuple):
    """Where in a file its sound lies."""

    begin: int
    end: int
    declared: int | None
    """Bytes that the header promises; None if it does not tell, or less than there are."""
    next_file: int | None = None
    """Where another file begins behind it, by the header."""
    mended: tuple[int, int, int, bytes] | None = None
    """Arguments of `view` that make the header tell what is there; None where it does."""
    too_large: bool = False
    """Whether the header has no room for what is there."""


class _Layout(NamedTuple):
    """Of a format of chunks, each with a name, a size and its content."""

    first: int
    name: int
    size: int
    order: str
    align: int
    counted: int
    """Bytes of a chunk's head that its size counts."""


_RIFF = _Layout(12, 4, 4, "little", 2, 0)
_IFF = _Layout(12, 4, 4, "big", 2, 0)
_LAYOUTS = {
    b"RIFF": _RIFF,
    b"RF64": _RIFF,
    b"BW64": _RIFF,
    b"RIFX": _IFF,
    b"FORM": _IFF,
    b"caff": _Layout(8, 4, 8, "big", 1, 0),
    b"riff": _Layout(40, 16, 8, "little", 8, 24),  # W64
}
# Names of the chunk that holds the sound, with the bytes that come before it there.
_SOUNDS = {b"data": 0, b"SSND": 8, b"BODY": 0}
# Names of chunks that may come behind the sound.
_TRAILERS = re.compile(
    rb"LIST|list|id3 |ID3 |bext|iXML|cue |smpl|inst|acid|fact|PEAK|JUNK|junk|_PMX|aXML|umid|strc|"
    rb"NAME|AUTH|ANNO|MARK|INST|APPL|COMT|info|free|levl|afsp|DISP|PXML|LGWV|minf|elm1|SAUR"
)
_TRAILING_BYTES = 2**20  # that they take at most
_JUNK = 512  # bytes behind the sound that are no more than a tag


def find_samples(file: BinaryIO) -> _Samples | None:
    """Where the sound of a format of chunks or of an AU file lies; None for other formats."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] in (b".snd", b"dns."):
        order = "big" if head[:1] == b"." else "little"
        begin, declared = (int.from_bytes(head[i : i + 4], order) for i in (4, 8))
        return _placed(file, size, begin, declared, (8, 4, order), 0, None)
    layout = _LAYOUTS.get(head[:4])
    if layout is None or (layout.first == 12 and head[8:] not in _KINDS):
        return None
    large = None
    for name, begin, declared in _chunks(file, layout.first, size, layout):
        if name == b"ds64":
            file.seek(begin + 8)
            large = int.from_bytes(file.read(8), "little"), (begin + 8, 8, "little")
        elif name in _SOUNDS:
            field = (begin - layout.size, layout.size, layout.order)
            if large and declared == 2**32 - 1:
                declared, field = large
            before = 4 if head[:4] == b"caff" else _SOUNDS[name]
            return _placed(file, size, begin + before, declared - before, field, before, layout)
    return None


def _placed(
    file: BinaryIO,
    size: int,
    begin: int,
    declared: int,
    field: tuple[int, int, str],
    before: int,
    layout: _Layout | None,
) -> _Samples:
    """What lies from `begin` on, of which the field at a position says how long it is.

    before: bytes in front of the sound that the field counts.
    """
    position, width, order = field
    before += layout.counted if layout else 0
    is_known = not _is_unknown(declared + before, width)
    if is_known and size - begin <= declared:
        return _Samples(begin, size, declared)
    end, next_file = begin + max(0, declared), None
    if is_known:
        next_file = _next_file(file, end, min(size, end + _TRAILING_BYTES))
        size = next_file or size
    if is_known or end == begin:
        padded = end + (-end % layout.align if layout else 0)
        if any(layout and _are_chunks(file, at, size, layout) for at in (end, padded)):
            return _Samples(begin, end, declared, next_file)
        if end > begin and (size - end <= _JUNK or _is_no_sound(file, end, size)):
            return _Samples(begin, end, declared, next_file)
    end = _before_trailers(file, begin, size, layout)
    value, most = end - begin + before, 2 ** (8 * width) - 1
    mended = (0, end, position, min(value, most).to_bytes(width, order))
    return _Samples(begin, end, None, next_file, mended, value >= most)


def _is_unknown(size: int, width: int) -> bool:
    """Whether a size is what writers put where they cannot go back: none, or the most there is."""
    if width == 8:
        return size <= 0 or size >= 2**63 - 2**16
    return (
        size <= 0
        or 0 <= size - 0x7F000000 <= 32  # SoX
        or 2**31 - 2**16 <= size <= 2**31
        or size >= 2**32 - 2**16
    )


def _chunks(file: BinaryIO, at: int, end: int, layout: _Layout) -> Iterator[tuple[bytes, int, int]]:
    """Names, of four bytes, beginnings and sizes of what chunks hold."""
    while at + layout.name + layout.size <= end:
        file.seek(at)
        head = file.read(layout.name + layout.size)
        begin = at + len(head)
        size = int.from_bytes(head[layout.name :], layout.order) - layout.counted
        yield head[:4], begin, size
        if size < 0:
            return
        at = begin + size
        at += -at % layout.align


def _are_chunks(file: BinaryIO, at: int, end: int, layout: _Layout) -> bool:
    """Whether nothing but whole chunks lies there."""
    if end - at < layout.name + layout.size:
        return end - at >= 0
    return all(
        re.fullmatch(rb"[ -~]{4}", name) and 0 <= size <= end - begin
        for name, begin, size in _chunks(file, at, end, layout)
    )


def _is_no_sound(file: BinaryIO, at: int, end: int) -> bool:
    """Whether a tag lies there that is no chunk, or nothing but zeros."""
    file.seek(at)
    if file.read(10).lstrip(b"\0").startswith((b"ID3", b"APETAGEX", b"LYRICSBE")):
        return True
    file.seek(at)
    while at < end and (data := file.read(min(BLOCK, end - at))):
        if data.strip(b"\0"):
            return False
        at += len(data)
    return True


def _before_trailers(file: BinaryIO, begin: int, size: int, layout: _Layout | None) -> int:
    """Where the sound ends that goes on until other chunks come, or the file ends."""
    if layout is None:
        return size
    at = max(begin, size - _TRAILING_BYTES)
    file.seek(at)
    for match in _TRAILERS.finditer(file.read(size - at)):
        if _are_chunks(file, at + match.start(), size, layout):
            return at + match.start()
    return size


def _loss(samples: _Samples, sound: Sound) -> str | None:
    """What is missing of a sound by its header; compressed formats may lack a little."""
    there = max(1, samples.end - samples.begin)
    missing = (samples.declared or 0) - there
    if sound.frames is None:
        lost = missing > 2**12 and f"{samples.declared} bytes of sound, and there are {there}"
    else:
        seconds = sound.frames / sound.sample_rate
        lost = seconds * missing / there > MISSING_SECONDS and (
            f"{seconds * samples.declared / there:.2f} s of sound, and there are {seconds:.2f}"
        )
    return f"its header promises {lost}" if lost else sound.loss


# How more headers begin, and how many of their bytes are the same in all files of a format.
_HEADERS = {
    b"riff": 16,
    b".snd": 7,
    b"Crea": 20,  # VOC
    b"FLV\1": 9,
    b"TTA1": 6,
    b"MAC ": 6,
    b"nut/": 24,
    b"\x30\x26\xb2\x75": 16,  # ASF
    b"\x1a\x45\xdf\xa3": 5,  # Matroska
}


def _second_header(file: BinaryIO, samples: _Samples | None) -> int | None:
    """Where one file ends that another lies behind; None if there is none."""
    if samples and samples.next_file:
        return samples.next_file
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(24)
    if head[4:8] == b"ftyp":
        return _behind_boxes(file, size)
    if head[:4] in _HEADERS:
        pattern = re.compile(re.escape(head[: _HEADERS[head[:4]]]))
    elif head[:4] in _BEGINNINGS:
        pattern = _BEGINNINGS[head[:4]]
    else:
        return None
    begin = len(head) if samples is None else samples.begin + (samples.declared or 0)
    return _next_file(file, begin, size, {head[:4]: pattern})


def _behind_boxes(file: BinaryIO, size: int) -> int | None:
    """Where behind the boxes of an MPEG-4 file another file begins."""
    at = 0
    while at < size:
        if at and _next_file(file, at, at + 1) is not None:
            return at
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[8:] if head[:4] == b"\0\0\0\1" else head[:4])
        length = _tag_size(head) or length
        if length < 8:  # up to the end of the file, or no box
            return None
        at += length
    return None


class _View(io.RawIOBase):
    """A part of a file's bytes as a file, of which a few may be others."""

    def __init__(
        self, file: BinaryIO, begin: int, end: int, at: int, field: bytes, watch: _Watch | None
    ):
        self._file, self._begin, self._size = file, begin, end - begin
        self._at, self._field, self._watch = at, field, watch
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._watch:
            last = min(self._size, self._position + len(buffer))
            place = self._watch(self._begin + self._position, self._begin + last)
            self._size = self._size if place is None else place - self._begin
        self._file.seek(self._begin + self._position)
        data = bytearray(self._file.read(min(len(buffer), max(0, self._size - self._position))))
        first = max(0, self._at - self._position)
        last = min(len(data), self._at + len(self._field) - self._position)
        if first < last:
            shift = self._position - self._at
            data[first:last] = self._field[first + shift : last + shift]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def view(
    open_file: Callable[[], BinaryIO],
    begin: int,
    end: int,
    at: int = 0,
    field: bytes = b"",
    watch: _Watch | None = None,
) -> BinaryIO:
    """A part of a file as a file, with other bytes at a position; it ends where another begins."""
    return io.BufferedReader(_View(open_file(), begin, end, at, field, watch), BLOCK)


# --- libsndfile -----------------------------------------------------------------------------------

# Its log, where a header promises more than the file has: MAT4, WVE
_CUT_OFF = [
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"seems to be truncated\. (?P<actual>\d+) <--> (?P<declared>\d+)",
        r"^Data length (?P<declared>\d+) should be (?P<actual>\d+)",
    )
]


def _open_sndfile(source: str | BinaryIO, stack: ExitStack) -> Sound | None:
    """None for what libsndfile cannot read, or not to its end, and for what is no plain sound."""
    import soundfile

    try:
        file = stack.enter_context(soundfile.SoundFile(source))
        compressed = file.format in ("OGG", "FLAC", "MP3") or file.subtype.startswith("MPEG_LAYER")
        if compressed or file.frames >= 2**62:
            return None
        if file.subtype.startswith("PCM") and file.seekable():
            if _is_encoded(file.read(_ENCODED_BYTES // 2, dtype="float32")):
                return None
            file.seek(0)
    except (soundfile.LibsndfileError, TypeError):  # (it wants to be told of samples in .raw)
        return None

    def read(skip: int, wanted: int | None) -> Iterator[np.ndarray]:
        if skip >= file.frames:
            return
        if skip:
            file.seek(skip)
        left = file.frames - skip if wanted is None else wanted
        while left > 0:
            block = file.read(min(left, BLOCK), dtype="float32", always_2d=True)
            if not len(block):
                break
            left -= len(block)
            yield block
        if wanted is None:
            _check_end((file.frames - left) / file.samplerate, file.frames / file.samplerate)

    subtype = file.subtype.removeprefix("PCM_").lower()
    return Sound(
        format=f"{file.format} {subtype}" + (" bit" if subtype.isdigit() else ""),
        sample_rate=file.samplerate,
        channels=file.channels,
        # 127/128, and 32767/32768
        full_scale=0.99 if file.subtype in ("PCM_S8", "PCM_U8") else 0.9999,
        frames=file.frames,
        loss=_cut_off(file),
        read=read,
    )


def _voc_loss(file: BinaryIO) -> str | None:
    """What is missing of a VOC file: blocks of a kind, a size of three bytes, and a content."""
    size = file.seek(0, os.SEEK_END)
    file.seek(20)
    at = int.from_bytes(file.read(2), "little")
    while at < size:
        file.seek(at)
        head = file.read(4)
        if head[0] == 0:  # the end
            return None
        at += 4 + int.from_bytes(head[1:], "little")
    return "ends within a block" if at > size else None


def _avi_loss(file: BinaryIO) -> str | None:
    """What is missing of an AVI by the sizes of its parts; its times count what is no sound."""
    size = file.seek(0, os.SEEK_END)
    for _, part, length in _chunks(file, 0, size, _RIFF):
        end = size if _is_unknown(length, 4) else min(size, part + length)
        for name, begin, length in _chunks(file, part + 4, end, _RIFF):
            file.seek(begin)
            if name != b"LIST" or file.read(4) != b"movi":
                continue
            if _is_unknown(length, 4):  # written where the writer could not go back
                packets = _chunks(file, begin + 4, size, _RIFF)
                ends = [first + length for _, first, length in packets]
                return "ends within a packet" if max(ends, default=0) > size else None
            if begin + length > size:
                return f"its header promises {begin + length} bytes, and there are {size}"
    return None


def _matroska_loss(file: BinaryIO) -> str | None:
    """What is missing of a Matroska file by the size of its segment, which holds all the rest."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_HEAD)
    at = head.find(_SEGMENT) + len(_SEGMENT)
    if at < len(_SEGMENT) or not head[at : at + 1].strip(b"\0"):
        return None
    width = 9 - head[at].bit_length()  # the first bit that is set tells how long the number is
    most = 2 ** (7 * width) - 1
    length = int.from_bytes(head[at : at + width]) & most
    if length == most or at + width + length <= size:  # the most there is: written to a pipe
        return None
    return f"its header promises {at + width + length} bytes, and there are {size}"


def _cut_off(file: Any) -> str | None:
    """What is missing of an open file by its headers, or None; not all formats can tell."""
    log = file.extra_info
    for pattern in _CUT_OFF:
        for match in pattern.finditer(log):
            declared, actual = int(match["declared"]), int(match["actual"])
            # (the number of samples is libsndfile's own, of the bytes that are there)
            missing = file.frames / file.samplerate * (declared / max(actual, 1) - 1)
            if missing > MISSING_SECONDS:
                return f"its header says {declared}, and there are {actual}"
    return None


def _check_end(seconds: float, promised: float) -> None:
    """Raises `RejectedError` where a sound ends before its header says."""
    if promised - seconds > MISSING_SECONDS:
        detail = f"ends at {seconds:.2f} s, where its header promises {promised:.2f}"
        raise RejectedError("cut off", detail)


# --- FFmpeg ---------------------------------------------------------------------------------------


def _open_ffmpeg(
    open_file: Callable[[], BinaryIO], stack: ExitStack, *, seeks: bool = True
) -> Sound:
    import av

    file = stack.enter_context(open_file())
    # A file of another format that is renamed must lead nowhere.
    options = {"format_whitelist": _FFMPEG_FORMATS, "protocol_whitelist": ""}
    try:
        container = stack.enter_context(av.open(file, options=options, metadata_errors="replace"))
        stream = _stream(container)
        frames = _frames(container, stream)
        # A header may name another rate than the sound has, as that of HE-AAC does.
        first = next(frames, None)
    except av.FFmpegError as error:
        detail = f"neither libsndfile nor FFmpeg reads it ({error.strerror})"
        raise RejectedError("unreadable", detail) from None
    if first is None:
        raise RejectedError("empty", "no samples")
    name, codec = _names(container, stream)
    rate, origin = first.sample_rate, first.time or 0.0
    beginning = float((stream.start_time or 0) * stream.time_base)
    promised = _promised_seconds(container, stream, beginning, rate, open_file)

    def sought(skip: int) -> tuple[int, Iterable[Any]] | None:
        """Where the container's index leads to, and frames from there; None if it is no use."""
        container.seek(int((origin + skip / rate - _SEEK_AHEAD) * av.time_base))
        after = _frames(container, stream)
        landed = next(after, None)
        if landed is None:
            return skip, ()
        start = round(((landed.time or 0.0) - origin) * rate)
        if start > skip or landed.sample_rate != rate:
            return None
        return start, itertools.chain([landed], after)

    def read(skip: int, wanted: int | None) -> Iterator[np.ndarray]:
        with _rejecting(file):
            found = 0, itertools.chain([first], frames)
            joined = name == "mp3" and _xing(open_file, rate)[1]
            if seeks and skip > _SEEK_AHEAD * rate and not joined:
                found = sought(skip)
            if found is None:
                yield from _open_ffmpeg(open_file, stack, seeks=False).read(skip, wanted)
                return
            start, reached = found[0], 0.0
            position = start / rate  # in seconds

            def heard(frames: Iterable[Any]) -> Iterator[tuple[int, np.ndarray]]:
                nonlocal position, reached
                for frame in frames:
                    seconds = frame.samples / frame.sample_rate
                    position += seconds
                    if name in _TIMED and frame.time is not None:
                        reached = max(reached, frame.time + seconds - beginning)
                    yield frame.sample_rate, _samples(frame)

            yield from _cut_out(_at_rate(rate, heard(found[1])), skip - start, wanted)
            if promised is not None and wanted is None:
                _check_end(max(reached, position), promised)

    return Sound(
        format=_NAMES.get(codec, codec) if codec == name else f"{codec} in {name}",
        sample_rate=rate,
        channels=first.layout.nb_channels,
        full_scale=0.99 if first.format.name.startswith("u8") else 0.9999,
        frames=None if promised is None else round(promised * rate),
        loss=None,
        read=read,
    )


def _names(container: Any, stream: Any) -> tuple[str, str]:
    return container.format.name.split(",")[0], stream.codec_context.codec.canonical_name


def _stream(container: Any) -> Any:
    if not container.streams.audio:
        raise RejectedError("unreadable", "no sound in it")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise RejectedError(
            "unreadable", "its sound is of a kind that neither libsndfile nor FFmpeg knows"
        )
    if _names(container, stream)[1] == "flac" and not stream.codec_context.is_open:
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    return stream


@contextmanager
def _rejecting(file: BinaryIO) -> Iterator[None]:
    """What cannot be decoded is a `RejectedError`."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if file.tell() == file.seek(0, os.SEEK_END):
            raise RejectedError("cut off", "ends within a packet") from None
        raise RejectedError("unreadable", f"damaged ({error.strerror})") from None


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    name, codec = _names(container, stream)
    if codec in _MPEG:
        return _mpeg_frames(container, stream)
    return _flac_frames(container, stream) if name == "flac" else container.decode(stream)


def _mpeg_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of MP3, which may have padding and tags before them, behind them and between files.

    What cannot be decoded before the first frame is no sound, nor is a tag or a little at the end.
    """
    import av

    begun, damage, rest = False, None, b""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError as error:
            rest += bytes(packet) if begun else b""
            if begun and bytes(packet)[:3] not in (b"ID3", b"TAG", b"APE"):
                damage = error
            continue
        if frames:
            if damage:
                raise damage
            begun, rest = True, bytes(packet)  # (it may hold the beginning of a tag)
        yield from frames
    rest = rest.strip(b"\0")
    if len(rest) > _LARGEST_REST and not re.search(rb"ID3|APETAGEX|LYRICSBEGIN", rest[:4096]):
        raise RejectedError("unreadable", f"{len(rest)} bytes behind its sound are no MP3")


def _flac_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of FLAC, which FFmpeg leaves out where they are damaged; each knows its place."""
    due = 0.0  # the latest time of the next frame
    for number, frame in enumerate(container.decode(stream)):
        if number and frame.time is not None and frame.time > due + _FLAC_ROUNDING:
            raise RejectedError("unreadable", f"damaged at {due:.2f} s")
        begin = due if frame.time is None else frame.time
        due = begin + frame.samples / frame.sample_rate
        yield frame


def _promised_seconds(
    container: Any, stream: Any, beginning: float, rate: int, open_file: Callable[[], BinaryIO]
) -> float | None:
    """How long the sound is by the header, where it notes that; elsewhere FFmpeg guesses."""
    import av

    name, codec = _names(container, stream)
    if name == "mp3":
        frames = _xing(open_file, rate)[0]
        return None if frames is None else frames / rate
    if name not in (*_TIMED, *_COUNTED) or (name, codec) == ("ogg", "flac"):
        return None  # (where FLAC in Ogg begins FFmpeg does not tell)
    # A header that has one time for all of a film, or for several tracks, has that of the longest.
    cover = av.stream.Disposition.attached_pic
    others = [s for s in container.streams.video if not s.disposition & cover]
    alone = not others and len(container.streams.audio) == 1
    seconds = None
    if name == "asf":
        seconds = _asf_seconds(open_file, alone)
    elif name in ("flv", "matroska") and not _is_noted(name, open_file, alone):
        return None
    elif stream.duration is not None:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration:
        seconds = container.duration / av.time_base
    if seconds and (name in _ENDED or f"{codec} in {name}" in _ENDED):
        return seconds - max(0.0, beginning)
    return seconds


def _is_noted(name: str, open_file: Callable[[], BinaryIO], alone: bool) -> bool:
    """Whether a container's time is that of its one sound, and no guess from the bit rate.

    That of several streams counts where the file is shorter than its header says.
    """
    with open_file() as raw:
        head = raw.read(_HEAD)
        size = raw.seek(0, os.SEEK_END)
    if name == "matroska":
        info = _SEGMENT_INFO.search(head)
        noted = info and _DURATION.search(head, info.end(), info.end() + 2**12)
        return bool(alone and noted and noted[1].strip(b"\0"))
    at = head.find(_FLV_SIZE) + len(_FLV_SIZE)
    if alone or at < len(_FLV_SIZE) or len(head) < at + 8:
        return alone
    return struct.unpack_from(">d", head, at)[0] > size


def _asf_seconds(open_file: Callable[[], BinaryIO], alone: bool) -> float | None:
    """When the sound of an ASF file ends; FFmpeg guesses where the file has another size.

    The time of a film counts where the file is shorter than its header says.
    """
    with open_file() as raw:
        head = raw.read(_HEAD)
        size = raw.seek(0, os.SEEK_END)
    at = head.find(_ASF_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return None
    noted_size, _, _, ticks, _, preroll, flags = struct.unpack_from("<QQQQQQI", head, at + 40)
    if flags & 1 or not (alone or noted_size > size):  # 1: streamed
        return None
    return ticks / 1e7 - preroll / 1e3


def _xing(open_file: Callable[[], BinaryIO], rate: int) -> tuple[int | None, bool]:
    """How many samples an MP3 has by its first frame, and whether more lies behind those."""
    with open_file() as raw:
        frame = raw.read(_FIRST_MP3_FRAME)
        size = raw.seek(0, os.SEEK_END)
    # Of the four flags 1 means that the number of frames follows, 2 that of bytes.
    found = re.search(rb"(?:Xing|Info)\0\0\0([\0-\x0f])", frame)
    if not found or not found[1][0] & 1:
        return None, False
    flags, fields = found[1][0], frame[found.end() :]
    more = flags & 2 and size - found.start() > 1.01 * int.from_bytes(fields[4:8])
    count = int.from_bytes(fields[:4]) * (1152 if rate >= 32_000 else 576)
    lame = fields[4 + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2 :]
    if lame[:4] in (b"LAME", b"Lavf", b"Lavc"):  # what its encoder put before and behind
        count -= int.from_bytes(lame[21:23]) >> 4
        count -= int.from_bytes(lame[22:24]) & 0xFFF
    return count, bool(more)


def _samples(frame: Any) -> np.ndarray:
    """FFmpeg's samples as [n, channels], of its own type."""
    samples = frame.to_ndarray()
    if frame.format.is_planar:
        return samples.T
    return samples.reshape(-1, frame.layout.nb_channels)


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Samples as float32, of which full scale is 1."""
    if samples.dtype == np.float32:
        return samples
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    scale = -1 / np.iinfo(samples.dtype).min  # a power of two
    return np.multiply(samples, np.float32(scale), dtype=np.float32, casting="unsafe")


def _at_rate(rate: int, parts: Iterable[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
    """Samples [n, channels] at one rate, as float32 where they had another; of parts whose rates
    and channels may change.
    """
    for (its_rate, channels), group in itertools.groupby(parts, lambda p: (p[0], p[1].shape[1])):
        if its_rate == rate:
            yield from (samples for _, samples in group)
            continue
        resampler = soxr.ResampleStream(its_rate, rate, channels, dtype="float32", quality="VHQ")
        for _, samples in group:
            yield resampler.resample_chunk(_to_float(samples))
        yield resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True)


def _cut_out(parts: Iterable[np.ndarray], skip: int, wanted: int | None) -> Iterator[np.ndarray]:
    """Blocks, float32, of so many samples, None being all, behind those that are passed over.

    A block is converted at once: a frame has a few thousand samples, and so many calls take long.
    """
    held, count = [], 0
    for samples in parts:
        drop = min(skip, len(samples))
        skip -= drop
        samples = samples[drop:] if wanted is None else samples[drop : drop + wanted]
        if held and (count >= BLOCK or not _are_alike(samples, held[0])):
            yield _to_float(np.concatenate(held))
            held, count = [], 0
        if len(samples):
            held.append(samples)
            count += len(samples)
        if wanted is not None and not (wanted := wanted - len(samples)):
            break
    if held:
        yield _to_float(np.concatenate(held))


def _are_alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape[1] == other.shape[1]


# --- Ogg: streams one behind the other ------------------------------------------------------------


def _open_ogg(open_file: Callable[[], BinaryIO], file: BinaryIO, stack: ExitStack) -> Sound:
    links, loss = _ogg_links(file)
    openers = [
        functools.partial(_open_ffmpeg, functools.partial(view, open_file, *link)) for link in links
    ]
    try:
        sound = openers[0](stack)
        sound = _chained(sound, openers[1:]) if len(links) > 1 else sound
    except RejectedError:
        if loss is None or len(links) > 1:
            raise
        raise RejectedError("cut off", loss) from None
    return replace(sound, loss=loss)


def _ogg_links(file: BinaryIO) -> tuple[list[tuple[int, int]], str | None]:
    """Where streams that play one after the other begin and end, and what the last one lacks."""
    size = file.seek(0, os.SEEK_END)
    begins, at, begin_before, loss = [], 0, False, "ends within a page"
    while (at := _next_ogg_page(file, at, size)) < size:
        file.seek(at)
        # [5] flags, of which 2 begins a stream and 4 ends it; [26] number of segments, whose
        # lengths follow
        head = file.read(27 + 255)
        end = at + 27 + head[26] + sum(head[27 : 27 + head[26]]) if len(head) >= 27 else size + 1
        if end > size:
            loss = "ends within a page"
            break
        # The page that ends the stream may be missing, as where FFmpeg cut it into files. Of a
        # packet whose last piece has 255 bytes there is more on the next page.
        goes_on = not head[5] & 4 and head[26 + head[26]] == 255 and head[26] > 0
        loss = "ends within a packet" if goes_on else None
        begins_stream = bool(head[5] & 2)
        if begins_stream and not begin_before:
            begins.append(at)
        begin_before, at = begins_stream, end
    begins = begins or [0]
    return list(itertools.pairwise([*begins, size])), loss


def _next_ogg_page(file: BinaryIO, at: int, size: int) -> int:
    """Where a page begins, from a place on; `size` if there is none."""
    while at < size:
        file.seek(at)
        data = file.read(4)
        if data == b"OggS":
            return at
        file.seek(at)
        found = file.read(_LARGEST_OGG_PAGE).find(b"OggS")
        if found >= 0:
            return at + found
        at += _LARGEST_OGG_PAGE - 3
    return size


# --- films' sound in files of plain samples -------------------------------------------------------

_ENCODED_BYTES = 2**16  # to look for it in
# DTS of 16 and 14 bit, and IEC 61937, in both orders of bytes
_SYNC_WORDS = [
    bytes.fromhex(word)
    for word in ("fe7f0180", "7ffe8001", "ff1f00e8", "1fffe800", "72f81f4e", "f8724e1f")
]
_AC3_FRAMES = _ENCODED_BYTES // 3840 // 2  # there at the highest bit rate, with some to spare


def _as_sound(
    read: Callable[[int, int | None], Iterator[np.ndarray]], skip: int, wanted: int | None
) -> Iterator[np.ndarray]:
    """The blocks of a file, unless their numbers are no samples."""
    loud = 0
    for block in read(skip, wanted):
        if loud < 2 and block.any():
            loud += 1
            if _is_encoded(block):
                raise RejectedError(
                    "not sound",
                    "DTS or Dolby Digital, which play as noise; convert it, as with 'ffmpeg -i "
                    "FILE NEW.flac'",
                )
        yield block


def _is_encoded(block: np.ndarray) -> bool:
    """Whether 16-bit samples are DTS or AC-3, as on CDs and beside films, and no sound."""
    import av

    samples = block.ravel()
    begin = np.flatnonzero(samples)[:1]
    samples = samples[begin[0] :][: _ENCODED_BYTES // 2] if len(begin) else samples[:0]
    words = np.clip(
        np.round(np.nan_to_num(samples, posinf=1, neginf=-1) * 2**15), -(2**15), 2**15 - 1
    ).astype("<i2")
    data = words.tobytes()
    if not _has_ac3_words(words) and not any(word in data for word in _SYNC_WORDS):
        return False
    # The words may stand there by chance. FFmpeg looks for frames.
    for order in (data, words.byteswap().tobytes()):
        try:
            options = {"format_whitelist": "ac3,dts,eac3,spdif"}
            with av.open(io.BytesIO(order), options=options):
                return True
        except av.FFmpegError:
            pass
    return False


def _has_ac3_words(words: np.ndarray) -> bool:
    """Whether AC-3's sync word comes often, two words before a version that there is."""
    for word, shift in ((0x770B, 8), (0x0B77, 0)):
        at = np.flatnonzero(words[:-2] == word) + 2
        version = (words[at] >> shift & 0xFF) >> 3
        if np.count_nonzero((version >= 5) & (version <= 16)) >= _AC3_FRAMES:
            return True
    return False
