"""Audio intake: which files a folder holds, and one of them as samples, or why not."""

import hashlib
import json
import math
import os
import re
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

_BLOCK = 2**17  # frames read at once
# Compressed formats may miss their header's length by a few of their own frames.
_MISSING_SECONDS = 0.1
# libsndfile's log, where a header promises more bytes than the file has
_CUT_OFF = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 2**31 - 2**16  # streamed files promise about 2**31 or 2**32 bytes


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
    """Changes with the name, size or time of any audio file and the content of any caption."""


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
    Raises `UserError` if the folder is missing or holds no audio.
    """
    if not folder.is_dir():
        raise UserError(f"audio folder {folder}: no such folder")
    folder = folder.resolve()
    tracks, rejects, ignored, seen = [], [], Counter(), set()
    digest = hashlib.sha256()
    for path in _files(folder):
        if path.suffix.lower() not in SUFFIXES and not path.is_dir():
            ignored[path.suffix.lower() or "none"] += path.suffix.lower() != ".json"
            continue
        name = path.relative_to(folder).as_posix()
        shown = name.encode(errors="backslashreplace").decode()
        try:
            if shown != name:
                raise RejectedError("bad name", "the file name is not UTF-8")
            try:
                if not path.resolve().is_relative_to(folder):
                    raise RejectedError("outside the folder", "a link out of the folder")
                stat = path.stat()
            except (OSError, RuntimeError):  # (RuntimeError: links in a circle)
                raise RejectedError("unreadable", "a link to nothing") from None
            digest.update(f"{name}\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
            track_id = path.relative_to(folder).with_suffix("").as_posix()
            if track_id in seen:
                raise RejectedError("duplicate", "another file has this name but for its suffix")
            seen.add(track_id)
            caption, info = _read_caption(path.with_suffix(".json"), folder, digest)
            tracks.append(Track(path=name, track_id=track_id, caption=caption, info=info))
        except RejectedError as error:
            rejects.append(Reject(path=shown, reason=error.reason, detail=error.detail))
            digest.update(f"{shown}\n{error.reason}\n".encode())
    if not tracks and not rejects:
        raise UserError(f"audio folder {folder}: no audio in it ({describe_ignored(ignored)})")
    return Manifest(
        tracks=tuple(tracks),
        rejects=tuple(rejects),
        ignored=dict(+ignored),
        fingerprint=digest.hexdigest(),
    )


def describe_ignored(ignored: dict[str, int]) -> str:
    """For people: what kinds of other files there were."""
    if not any(ignored.values()):
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
    except OSError:
        raise UserError(f"{path}: vanished while the job ran; run the job again") from None
    blocks, resampler, count = [], None, 0
    total, square = np.zeros(channels), 0.0
    try:
        with soundfile.SoundFile(path) as file:
            rate, promised = file.samplerate, file.frames
            if file.channels > 2:
                raise RejectedError("too many channels", f"{file.channels} channels, 2 at most")
            for declared, actual in _CUT_OFF.findall(file.extra_info):
                if int(actual) < int(declared) < _UNKNOWN_LENGTH:
                    raise RejectedError("cut off", f"{actual} bytes of sound where {declared} are")
            if rate != sample_rate:
                resampler = soxr.ResampleStream(
                    rate, sample_rate, channels, dtype="float32", quality="VHQ"
                )
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise RejectedError("not finite", "holds NaN or infinite samples")
                count += len(block)
                if channels == 1:
                    block = block.mean(1, keepdims=True)
                elif block.shape[1] == 1:
                    block = np.repeat(block, 2, axis=1)
                total += block.sum(0, dtype=np.float64)
                square += np.square(block, dtype=np.float64).sum()
                blocks.append(resampler.resample_chunk(block) if resampler else block)
    except (soundfile.SoundFileError, ValueError, RuntimeError) as error:
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
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [Path(here, name) for name in folders if Path(here, name).is_symlink()]
        # (linked folders that stay inside are met where they really are)
        found += [path for path in links if not path.resolve().is_relative_to(folder)]
        found += [Path(here, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))


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
    except ValueError:
        raise RejectedError("no caption", f"{path.name} is not valid JSON") from None
    caption = fields.get("description") if isinstance(fields, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise RejectedError("no caption", f"{path.name} has no text under 'description'")
    rest = {k: v for k, v in fields.items() if k != "description" and v is not None}
    return caption.strip(), json.dumps(rest, sort_keys=True)
