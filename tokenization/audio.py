"""Audio intake: which files a folder holds, and one of them as samples, or why not."""

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from magnet_jax.errors import UserError

# Files with these suffixes count as audio: soundfile's formats, less header-less samples, and the
# other names that those formats go by.
SUFFIXES = frozenset(f".{name.lower()}" for name in soundfile.available_formats()) - {".raw"} | {
    ".8svx", ".aif", ".aifc", ".iff", ".mat", ".mp2", ".nist", ".oga", ".opus", ".sf", ".snd",
    ".sph", ".wave",
}  # fmt: skip
SILENCE_DBFS = -60.0
LARGEST_PEAK = 8.0  # full scale is 1; samples of +-32768 are no float audio

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
_SAMPLED = 2**16  # bytes of either end of a file that its fingerprint is made of


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A file that is left out: its path below the audio folder, and why."""

    path: str
    reason: str
    """One of a few fixed phrases, to be counted."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class Track:
    """A captioned audio file that has not been opened yet."""

    path: str
    """Below the audio folder."""
    track_id: str
    """The path without suffix."""
    caption: str
    info: str
    """JSON object of the sidecar's other fields, less those that are null."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of audio holds, in a fixed order."""

    tracks: tuple[Track, ...]
    rejects: tuple[Reject, ...]
    """Audio files that need not be opened to be refused."""
    ignored: dict[str, int]
    """Number of files that are no audio, by suffix."""
    fingerprint: str
    """Changes with the name, size, first or last 64 KiB of any audio file, and with any caption."""


class RejectedError(Exception):
    """Raised by `read_audio`, with a `Reject`'s reason and detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def scan(folder: Path) -> Manifest:
    """Lists the audio below a folder, with the captions of the .json file beside each.

    Names that begin with a dot are passed over. Links that lead out of the folder are rejected,
    and linked folders are not entered. Of files that differ in their suffix only, the first counts.
    A captioned file of another suffix is taken for audio that cannot be read, and rejected.
    Raises `UserError` if the folder or one in it cannot be listed, or holds no audio.
    """
    if not folder.is_dir():
        raise UserError(f"audio folder {folder}: no such folder")
    folder = folder.resolve()
    tracks, rejects, others, seen = [], [], [], set()
    digest = hashlib.sha256()
    for path in _files(folder):
        if path.suffix.lower() not in SUFFIXES and not path.is_dir():
            others.append(path)
            continue
        name, shown, track_id = _names(path, folder)
        try:
            if shown != name:
                raise RejectedError("bad name", "the file name is not UTF-8")
            try:
                if not path.resolve().is_relative_to(folder):
                    raise RejectedError("outside the folder", "a link out of the folder")
                digest.update(f"{name}\n".encode() + _fingerprint(path))
            except (FileNotFoundError, RuntimeError):  # (RuntimeError: links in a circle)
                raise RejectedError("unreadable", "a link to nothing") from None
            except OSError as error:
                raise RejectedError("unreadable", str(error.strerror)) from None
            if track_id in seen:
                raise RejectedError("duplicate", "another file has this name but for its suffix")
            seen.add(track_id)
            caption, info = _read_caption(path.with_suffix(".json"), folder, digest)
            tracks.append(Track(path=name, track_id=track_id, caption=caption, info=info))
        except RejectedError as error:
            rejects.append(Reject(path=shown, reason=error.reason, detail=error.detail))
            digest.update(f"{shown}\n{error.reason}\n".encode())
    ignored: Counter[str] = Counter()
    for path in others:
        suffix = path.suffix.lower()
        if suffix == ".json":
            continue
        _, shown, track_id = _names(path, folder)
        if track_id in seen or not _has_caption(path, folder):
            ignored[suffix or "none"] += 1
            continue
        seen.add(track_id)
        rejects.append(Reject(path=shown, reason="unknown format", detail=suffix or "no suffix"))
        digest.update(f"{shown}\nunknown format\n".encode())
    if not tracks and not rejects:
        raise UserError(f"audio folder {folder}: no audio in it ({describe_ignored(ignored)})")
    return Manifest(
        tracks=tuple(tracks),
        rejects=tuple(rejects),
        ignored=dict(ignored),
        fingerprint=digest.hexdigest(),
    )


def describe_ignored(ignored: dict[str, int]) -> str:
    """For people: what kinds of other files there were."""
    if not ignored:
        return "no other files"
    kinds = sorted(ignored.items(), key=lambda kind: (-kind[1], kind[0]))[:5]
    return f"{sum(ignored.values())} other files: " + ", ".join(f"{n} {s}" for s, n in kinds)


def read_audio(path: Path, sample_rate: int, channels: int, min_seconds: float) -> np.ndarray:
    """Samples [C, N] (float32) of an audio file, mixed to `channels` and resampled (soxr, VHQ).

    Stereo becomes mono as the mean of both, mono becomes stereo twice the same. Raises
    `RejectedError` for files that are not fit, `UserError` if the file is gone.
    """
    try:
        if path.stat().st_size == 0:
            raise RejectedError("empty", "a file of 0 bytes")
    except FileNotFoundError:
        raise UserError(f"{path}: vanished while the job ran; run the job again") from None
    except OSError as error:
        raise RejectedError("unreadable", str(error.strerror)) from None
    blocks, resampler, count = [], None, 0
    total, square = np.zeros(channels), 0.0
    try:
        with soundfile.SoundFile(path) as file:
            rate, promised = file.samplerate, file.frames
            if file.channels > 2:
                raise RejectedError("too many channels", f"{file.channels} channels, 2 at most")
            if loss := _cut_off(path, file):
                raise RejectedError("cut off", loss)
            if rate != sample_rate:
                resampler = soxr.ResampleStream(
                    rate, sample_rate, channels, dtype="float32", quality="VHQ"
                )
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise RejectedError("not finite", "holds NaN or infinite samples")
                if (peak := np.abs(block).max()) > LARGEST_PEAK:
                    raise RejectedError("too loud", f"a peak of {peak:.0f} where full scale is 1")
                count += len(block)
                if channels == 1:
                    block = block.mean(1, keepdims=True)
                elif block.shape[1] == 1:
                    block = np.repeat(block, 2, axis=1)
                total += block.sum(0, dtype=np.float64)
                square += np.square(block, dtype=np.float64).sum()
                blocks.append(resampler.resample_chunk(block) if resampler else block)
    except (soundfile.SoundFileError, OSError, ValueError, RuntimeError) as error:
        detail = getattr(error, "error_string", None) or str(error)
        # (messages may hold the whole path, which differs between machines)
        raise RejectedError("unreadable", detail.replace(str(path), path.name)) from None
    if count == 0:
        raise RejectedError("empty", "no samples")
    if promised < 2**62 and promised - count > _MISSING_SECONDS * rate:
        raise RejectedError("cut off", f"{count} samples where the header says {promised}")
    if count < min_seconds * rate:
        raise RejectedError("too short", f"{count / rate:.3f} s")
    # A constant offset is no sound, so this is the level around each channel's mean.
    variance = max(0.0, square / (count * channels) - np.mean(np.square(total / count)))
    level = 10 * math.log10(variance + 1e-20)
    if level < SILENCE_DBFS:
        raise RejectedError("silent", f"{level:.0f} dBFS")
    if resampler:
        blocks.append(resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True))
    return np.ascontiguousarray(np.concatenate(blocks).T)


def _files(folder: Path) -> list[Path]:
    """All files below a folder and linked folders in it that lead out, sorted, dot names not."""

    def fail(error: OSError) -> None:
        # (its tracks would be missing without a word)
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

    found = []
    for here, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [Path(here, name) for name in folders if Path(here, name).is_symlink()]
        # (linked folders that stay inside are met where they really are)
        found += [path for path in links if not path.resolve().is_relative_to(folder)]
        found += [Path(here, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))


def _names(path: Path, folder: Path) -> tuple[str, str, str]:
    """A file's path below the folder, the same in valid UTF-8, and without its suffix."""
    below = path.relative_to(folder)
    name = below.as_posix()
    shown = name.encode(errors="backslashreplace").decode()
    return name, shown, below.with_suffix("").as_posix()


def _fingerprint(path: Path) -> bytes:
    """Of a file's size and both of its ends; a copy has the same, whatever its time."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # (opening a pipe would wait for ever)
        raise RejectedError("unreadable", "not a regular file")
    digest = hashlib.sha256(f"{status.st_size}\n".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLED))
        file.seek(max(0, status.st_size - _SAMPLED))
        digest.update(file.read(_SAMPLED))
    return digest.digest()


def _cut_off(path: Path, file: soundfile.SoundFile) -> str | None:
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
    if file.format == "OGG":
        size = path.stat().st_size
        with path.open("rb") as raw:
            raw.seek(max(0, size - _LARGEST_OGG_PAGE))
            end = raw.read()
        page = end[max(0, end.rfind(b"OggS\0")) :]
        # header of 27 bytes: [5] flags, of which 4 ends the stream; [26] number of segments, whose
        # lengths follow
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            return "ends within a page"
        if not page[5] & 4:
            return "the page that ends the stream is missing"
    return None


def _has_caption(path: Path, folder: Path) -> bool:
    try:
        _read_caption(path.with_suffix(".json"), folder, hashlib.sha256())
    except RejectedError:
        return False
    return True


def _read_caption(path: Path, folder: Path, digest: "hashlib._Hash") -> tuple[str, str]:
    """(caption, info) of a sidecar file; its bytes go into the digest."""
    try:
        if not path.resolve().is_relative_to(folder):
            raise RejectedError("outside the folder", "its caption is a link out of the folder")
        content = path.read_bytes()
        digest.update(hashlib.sha256(content).digest())
        fields = json.loads(content)
    except FileNotFoundError:
        raise RejectedError("no caption", f"no {path.name} beside it") from None
    except OSError as error:
        raise RejectedError("no caption", f"{path.name}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise RejectedError("no caption", f"{path.name} is not valid JSON") from None
    caption = fields.get("description") if isinstance(fields, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise RejectedError("no caption", f"{path.name} has no text under 'description'")
    rest = {k: v for k, v in fields.items() if k != "description" and v is not None}
    try:
        caption.encode()
        json.dumps(rest, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RejectedError("no caption", f"{path.name} holds half a character (\\ud8..)") from None
    except (ValueError, RecursionError):
        detail = f"{path.name} holds NaN or infinity, or is nested too deeply"
        raise RejectedError("no caption", detail) from None
    return caption.strip(), json.dumps(rest, sort_keys=True)
