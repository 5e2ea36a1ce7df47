"""Sound files whose samples are changed in places, while every other byte stays as it was.

Samples are the file's own numbers: integers are never turned into floats and back, and nothing is
dithered or resampled. Of WAV and AIFF, the chunks beside the samples stay as well, and of FLAC its
tags and pictures.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from magnet_jax.errors import UserError
from magnet_jax.io import chunks, formats
from magnet_jax.io.files import replacing_file

# Samples that a file holds as they are; all other ways of coding lose something.
BITS = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}
_FLOATS = {"FLOAT": np.float32, "DOUBLE": np.float64}
_FORMATS = {".wav": "WAV", ".flac": "FLAC", ".aiff": "AIFF", ".aif": "AIFF", ".aifc": "AIFF"}
DECODED = "PCM_24"  # what lossy formats count as, once decoded


class Source(NamedTuple):
    """A sound file's own samples."""

    path: Path
    samples_NC: np.ndarray
    """int32, the file's integers shifted up to full scale, or float32 or float64."""
    sample_rate: int
    subtype: str
    """What the file's samples are, as soundfile names it; for lossy formats, what they become."""
    lossy: bool = False

    @property
    def step(self) -> float:
        """Between two numbers that a sample can have, of full scale; 0 for floats."""
        return 2.0 ** (1 - BITS[self.subtype]) if self.subtype in BITS else 0.0

    def as_float(self) -> np.ndarray:
        """Samples [N, C] in [-1, 1), float64."""
        scale = 2.0**31 if self.samples_NC.dtype == np.int32 else 1.0
        return self.samples_NC.astype(np.float64) / scale


def read(path: Path) -> Source:
    """Reads a whole sound file; `UserError` for one that is damaged, cut off or no sound."""
    path = Path(path)
    try:
        wav_CN, sample_rate = formats.read_whole(str(path))
    except formats.RejectedError as error:
        raise UserError(f"{path}: cannot be read ({error.reason}: {error.detail})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with _opened(path) as file:
            subtype = file.subtype
            if subtype in BITS or subtype in _FLOATS:
                dtype = "int32" if subtype in BITS else np.dtype(_FLOATS[subtype]).name
                samples_NC = file.read(dtype=dtype, always_2d=True)
                if samples_NC.shape != wav_CN.T.shape or file.samplerate != sample_rate:
                    raise UserError(
                        f"{path}: holds more than its header tells, or less: convert it, as with "
                        "'ffmpeg -i FILE NEW.flac'"
                    )
                return Source(path, samples_NC, sample_rate, subtype)
    except soundfile.LibsndfileError:  # a format that FFmpeg reads
        pass
    samples_NC = as_written(wav_CN.T, DECODED, nearest=True)
    return Source(path, samples_NC, sample_rate, DECODED, lossy=True)


def _opened(path: Path) -> soundfile.SoundFile:
    """A file for libsndfile, which knows BW64 by its older name."""
    with path.open("rb") as file:
        if file.read(4) != b"BW64":
            return soundfile.SoundFile(path)
    size = path.stat().st_size
    return soundfile.SoundFile(formats.view(lambda: path.open("rb"), 0, size, 0, b"RF64"))


def as_written(wav_NC: np.ndarray, subtype: str, *, nearest: bool = False) -> np.ndarray:
    """The samples that libsndfile writes of floats, as `Source.samples_NC` has them.

    It rounds to 32 bits, cuts to full scale, and drops the lower bits. `nearest` rounds instead.
    """
    if subtype not in BITS:
        return wav_NC.astype(_FLOATS[subtype])
    dropped = 32 - BITS[subtype]
    whole_NC = np.rint(wav_NC.astype(np.float64) * 2.0**31)
    if nearest and dropped:
        whole_NC += 2.0 ** (dropped - 1)
    whole_NC = whole_NC.clip(-(2.0**31), 2.0**31 - 1).astype(np.int64)
    return (whole_NC >> dropped << dropped).astype(np.int32)


def check_name(source: Source, path: Path) -> None:
    """Raises `UserError` unless a file of this name can hold the samples of the source."""
    if _is_same_kind(source, path):
        return
    kinds = (".wav", ".flac") if source.lossy else (".wav", ".flac", ".aiff")
    holding = [suffix for suffix in kinds if _held_as(suffix, source.subtype)]
    suffix = path.suffix.lower()
    if {".aif": ".aiff", ".aifc": ".aiff"}.get(suffix, suffix) not in holding:
        what = f"decoded {source.path.suffix[1:].upper()}" if source.lossy else source.subtype
        raise UserError(
            f"{path}: cannot hold {what} samples exactly: the name must end in "
            f"{' or '.join(holding)}"
        )


def write(path: Path, source: Source, samples_NC: np.ndarray, *, before: int = 0) -> None:
    """Writes a copy of a source with other samples, never half a file.

    Where the file's kind stays, so does all that it holds beside samples: of WAV and AIFF each
    chunk, of FLAC each tag and picture. Chunks that depend on the samples follow them: counts,
    peaks, and the places of markers and loops. Those that would no longer be true are left out:
    check sums, and the number of beats of a clip that is longer now.

    Args:
      path: may be the source's own.
      source: what `read` gave, the file still there.
      samples_NC: of the dtype of the source's; more of them where it is drawn out.
      before: how many of them come before the source's first.

    Raises:
      UserError: a name that cannot hold such samples, or a file that cannot be written, or that
        changed since it was read.
    """
    path = Path(path)
    check_name(source, path)
    if samples_NC.dtype != source.samples_NC.dtype or samples_NC.ndim != 2:
        raise ValueError(f"samples_NC {samples_NC.dtype}: expected {source.samples_NC.dtype}")
    content = source.path.read_bytes() if _is_same_kind(source, path) else b""
    if content[:4] in chunks.ORDERS:
        old = source.samples_NC
        new = chunks.rewritten(str(source.path), content, old, samples_NC, source.subtype, before)
    else:
        new = _encoded(path, source, samples_NC)
        if content[:4] == b"fLaC":
            new = _with_flac_blocks(new, content, len(samples_NC) == len(source.samples_NC))
    with replacing_file(path) as temporary:
        temporary.write_bytes(new)


def _is_same_kind(source: Source, path: Path) -> bool:
    return path.suffix.lower() == source.path.suffix.lower() and not source.lossy


def _held_as(suffix: str, subtype: str) -> str | None:
    """The subtype of another kind of file that holds the same samples."""
    other = {"PCM_U8": "PCM_S8", "PCM_S8": "PCM_U8"}.get(subtype)
    for name in (subtype, other):
        if name and soundfile.check_format(_FORMATS[suffix], name):
            return name
    return None


def _encoded(path: Path, source: Source, samples_NC: np.ndarray) -> bytes:
    """A new file of these samples."""
    suffix = path.suffix.lower()
    kind = _FORMATS.get(suffix)
    if kind is None:
        with soundfile.SoundFile(source.path) as file:
            kind, subtype, endian = file.format, file.subtype, file.endian
    else:
        subtype, endian = _held_as(suffix, source.subtype), "FILE"
    buffer = io.BytesIO()
    try:
        with soundfile.SoundFile(
            buffer, "w", source.sample_rate, samples_NC.shape[1], subtype, endian, kind
        ) as file:
            file.write(samples_NC)
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"{path}: {kind} cannot hold {samples_NC.shape[1]} channels at {source.sample_rate} Hz "
            f"({error.error_string}); name it .wav"
        ) from None
    return buffer.getvalue()


# --- FLAC -----------------------------------------------------------------------------------------

_APPLICATION, _TAGS, _CUES, _PICTURE = 2, 4, 5, 6


def with_flac_tags(content: bytes, tags: Mapping[str, str]) -> bytes:
    """A FLAC with these Vorbis comments in place of its own."""
    texts = [f"{name}={text}".encode() for name, text in tags.items()]
    sized = b"".join(len(text).to_bytes(4, "little") + text for text in (b"magnet_jax", *texts))
    vendor = 4 + len(b"magnet_jax")
    data = sized[:vendor] + len(texts).to_bytes(4, "little") + sized[vendor:]
    blocks, sound = _flac_blocks(content)
    blocks = [block for block in blocks if block[0] != _TAGS]
    return _flac([*blocks, (_TAGS, data)], sound)


def _flac(blocks: list[tuple[int, bytes]], sound: bytes) -> bytes:
    heads = [
        bytes([kind | (128 if i == len(blocks) - 1 else 0)]) + len(data).to_bytes(3) + data
        for i, (kind, data) in enumerate(blocks)
    ]
    return b"fLaC" + b"".join(heads) + sound


def _flac_blocks(content: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Kinds and contents of a FLAC's blocks, and the sound behind them."""
    blocks, at, is_last = [], 4, False
    while not is_last:
        is_last, kind = bool(content[at] & 128), content[at] & 127
        end = at + 4 + int.from_bytes(content[at + 1 : at + 4])
        blocks.append((kind, content[at + 4 : end]))
        at = end
    return blocks, content[at:]


def _with_flac_blocks(new: bytes, old: bytes, is_as_long: bool) -> bytes:
    """A new FLAC with the blocks of an old one that do not describe how it is coded."""
    kept = (_APPLICATION, _TAGS, _PICTURE) + ((_CUES,) if is_as_long else ())
    blocks, sound = _flac_blocks(new)
    blocks = [block for block in blocks if block[0] not in (*kept, 1)]  # 1: room for tags
    blocks += [block for block in _flac_blocks(old)[0] if block[0] in kept]
    return _flac(blocks, sound)
