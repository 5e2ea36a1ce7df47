"""WAV and AIFF, files of chunks: other samples in them, and the other chunks as they were.

And the chunks by which music programs know a loop: its beats and tempo, where it goes back, where
its bars begin.
"""

import io
import re
import struct
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from magnet_jax.errors import UserError
from magnet_jax.io import formats

# How such files begin, and the order of their bytes as `struct` has it.
ORDERS = {b"RIFF": "<", b"RF64": "<", b"BW64": "<", b"RIFX": ">", b"FORM": ">"}
_SOUNDS = (b"data", b"SSND")
_FALSE_NOW = (b"MD5 ", b"levl")  # a check sum of the samples, and their envelope
_MOST = 2**32 - 1


def rewritten(
    where: str, content: bytes, old_NC: np.ndarray, new_NC: np.ndarray, subtype: str, before: int
) -> bytes:
    """A file with other samples; the same bytes where they are the same samples.

    Args:
      where: what errors call the file.
      content: of the file.
      old_NC: its samples, as `exact.Source` has them.
      new_NC: the samples wanted, as many or more.
      subtype: what the samples are, as soundfile names it.
      before: how many of the new ones come before the first old one.

    Raises:
      UserError: the file does not hold the old samples so, or would become too long.
    """
    order = ORDERS[content[:4]]
    found = formats.find_samples(io.BytesIO(content))
    swapped = found is not None and re.search(b"COMM.{22}(sowt|23ni|42n[i1])", content, re.DOTALL)
    little = order == "<" or bool(swapped)
    old, new = (_as_bytes(samples_NC, subtype, little) for samples_NC in (old_NC, new_NC))
    if found is None or content[found.begin : found.begin + len(old)] != old:
        raise UserError(
            f"{where}: was changed since it was read, or holds its samples in a way that is not "
            "known here: convert it, as with 'ffmpeg -i FILE NEW.flac'"
        )
    if len(old) == len(new) and old == new:
        return content
    parts = []
    for name, size, data, rest in _chunks(content, order, found.begin, len(old)):
        known = size == len(data)
        if name in _SOUNDS:
            data = data[: len(data) - len(old)] + new
        else:
            data = _followed(name, data, order, new_NC, len(old_NC), before)
        if data is not None:
            rest = rest if not name or len(data) % 2 == size % 2 else b"\0" * (len(data) % 2)
            head = name and name + struct.pack(f"{order}I", len(data) if known else size)
            parts.append(head + data + rest)
    body = b"".join(parts)
    grown = 12 + len(body) - len(content)
    size = struct.unpack_from(f"{order}I", content, 4)[0]
    if body[:4] == b"ds64":
        added = (grown, len(new) - len(old), len(new_NC) - len(old_NC))
        body = body[:8] + _added(body[8:], "<Q", {8 * i: n for i, n in enumerate(added)})
    elif size + grown > _MOST:
        raise UserError(f"{where}: would be longer than its format can be: name it .flac")
    else:
        size += grown
    return content[:4] + struct.pack(f"{order}I", size) + content[8:12] + body


def of_loop(
    count: int,
    sample_rate: int,
    starts: Sequence[int],
    *,
    bpm: float | None = None,
    beats: int = 0,
    beats_per_bar: int = 4,
    info: Mapping[str, str] | None = None,
) -> list[tuple[bytes, bytes]]:
    """Names and contents of the chunks that say of a WAV that it is a loop from end to end.

    Args:
      count: samples of the loop.
      sample_rate: samples per second.
      starts: the sample with which each bar begins; they become markers.
      bpm, beats, beats_per_bar: quarters a minute, in the loop and in a bar; without a tempo
        there is no 'acid' chunk, which is what has it.
      info: texts by the names of 'LIST' 'INFO', such as INAM.
    """
    period, key = round(1e9 / sample_rate), 60  # in nanoseconds; it is played as it is at C4
    loop = (0, 0, 0, count - 1, 0, 0)  # number, forwards, first, last, no part of it, for ever
    found = [(b"smpl", struct.pack("<15I", 0, 0, period, key, 0, 0, 0, 1, 0, *loop))]
    points = b"".join(
        struct.pack("<II4s3I", number, start, b"data", 0, 0, start)
        for number, start in enumerate(starts, 1)
    )
    labels = b"".join(
        _chunk(b"labl", struct.pack("<I", number) + _text(f"bar {number}"))
        for number in range(1, len(starts) + 1)
    )
    found += [(b"cue ", struct.pack("<I", len(starts)) + points), (b"LIST", b"adtl" + labels)]
    if bpm is not None:
        stretched = 4  # to the tempo of a song; the bit for "no loop" is not set
        meter = (4, beats_per_bar)
        acid = struct.pack("<IHHfIHHf", stretched, key, 0x8000, 0, beats, *meter, bpm)
        found.insert(0, (b"acid", acid))
    texts = b"".join(_chunk(k.encode(), _text(text)) for k, text in (info or {}).items())
    return [*found, (b"LIST", b"INFO" + texts)] if texts else found


def with_chunks(content: bytes, chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A WAV with more chunks behind what it holds."""
    if content[:4] != b"RIFF":
        raise ValueError(f"a file that begins with {content[:4]!r} has no room for chunks")
    body = content[8:] + b"".join(_chunk(*chunk) for chunk in chunks)
    return content[:4] + struct.pack("<I", len(body)) + body


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _text(text: str) -> bytes:
    return text.replace("\0", "").encode() + b"\0"


def _chunks(
    content: bytes, order: str, sound: int, count: int
) -> Iterator[tuple[bytes, int, bytes, bytes]]:
    """Of each chunk its name, the size that its head tells, its content and its padding.

    The samples are `count` bytes that begin at `sound`, whatever their head tells. What is no
    chunk, at the end, has no name.
    """
    at = 12
    while at + 8 <= len(content):
        name, size = struct.unpack_from(f"{order}4sI", content, at)
        end = min(at + 8 + size, len(content))
        if name in _SOUNDS:
            end = sound + count
        stop = min(end + end % 2, len(content))
        yield name, size, content[at + 8 : end], content[end:stop]
        at = stop
    yield b"", 0, b"", content[at:]


def _as_bytes(samples_NC: np.ndarray, subtype: str, little: bool) -> bytes:
    """Samples as a file holds them."""
    order = "<" if little else ">"
    if subtype in ("PCM_U8", "PCM_S8"):
        signed_NC = (samples_NC >> 24).astype(np.int8)
        return (signed_NC.view(np.uint8) ^ (128 if subtype == "PCM_U8" else 0)).tobytes()
    if subtype == "PCM_16":
        return (samples_NC >> 16).astype(f"{order}i2").tobytes()
    if subtype == "PCM_24":
        bytes_NC4 = samples_NC.astype(f"{order}i4").reshape(-1, 1).view(np.uint8)
        return bytes_NC4[:, slice(1, 4) if little else slice(0, 3)].tobytes()
    return samples_NC.astype(samples_NC.dtype.newbyteorder(order)).tobytes()


def _followed(
    name: bytes, data: bytes, order: str, samples_NC: np.ndarray, old_count: int, before: int
) -> bytes | None:
    """A chunk that is true of the new samples; None for one that cannot be."""
    count = len(samples_NC)
    if name in _FALSE_NOW or (name == b"acid" and count != old_count):  # (its beats are counted)
        return None
    if name == b"PEAK":
        return data[:8] + _peaks(samples_NC, order)
    if name == b"fact" or name == b"COMM":
        return _added(data, f"{order}I", {2 * (name == b"COMM"): count - old_count})
    if name == b"cue ":  # 24 bytes a point: [4] its place in the list, [20] its sample
        starts = range(4, len(data) - 23, 24)
        return _added(data, f"{order}I", {i + n: before for i in starts for n in (4, 20)})
    if name == b"smpl":  # loops of 24 bytes behind a head of 36: [8] first sample, [12] last
        starts = range(36, min(len(data), 36 + 24 * _loops(data, order)) - 23, 24)
        return _added(data, f"{order}I", {i + n: before for i in starts for n in (8, 12)})
    if name == b"bext":  # when the first sample is, in samples since midnight
        since = struct.unpack_from("<Q", data, 338)[0] if len(data) >= 346 else 0
        return _added(data, "<Q", {338: -min(before, since)}) if since else data
    if name == b"MARK":  # a number, a place, and a name with its length in front
        places, at = {}, 2
        while at + 7 <= len(data):
            places[at + 2] = before
            at += 7 + data[at + 6] + (data[at + 6] + 1) % 2
        return _added(data, ">I", places)
    return data


def _loops(data: bytes, order: str) -> int:
    return struct.unpack_from(f"{order}I", data, 28)[0] if len(data) >= 36 else 0


def _peaks(samples_NC: np.ndarray, order: str) -> bytes:
    """Of each channel of floats the highest amplitude, and where it is."""
    size_NC = np.abs(samples_NC)
    places_C = size_NC.argmax(0)
    return b"".join(
        struct.pack(f"{order}fI", size_NC[place, channel], place)
        for channel, place in enumerate(places_C)
    )


def _added(data: bytes, kind: str, more: dict[int, int]) -> bytes:
    """A chunk's content with numbers added to those that stand at places in it."""
    changed = bytearray(data)
    for place, number in more.items():
        if place + struct.calcsize(kind) <= len(data):
            old = struct.unpack_from(kind, data, place)[0]
            most = 2 ** (8 * struct.calcsize(kind)) - 1
            struct.pack_into(kind, changed, place, min(old + number, most))
    return bytes(changed)
