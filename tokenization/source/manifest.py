"""The tracks of a source, written down once: shards, restarts and Beam's workers read them there.

A source of millions of files takes hours to scan. What is written is one line of JSON a track or
reject, between one of the source's settings and one that ends it, with a hash of all before it.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from tokenization.source.settings import Source
from tokenization.track import FileBytes, Reject, RowBytes, Track

NAME = "manifest.jsonl"  # below --out

_FORMAT = "magnet_jax manifest 1"
_GONE = (-1, -1)
_THREADS = 16  # as in a scan, they mostly wait
_PATHS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a source holds, in a fixed order."""

    tracks: tuple[Track, ...]
    rejects: tuple[Reject, ...]
    """Tracks that need not be opened to be refused."""
    ignored: dict[str, int]
    """Number of files that are no audio, by suffix."""
    fingerprint: str
    """Changes with the path, size, first or last bytes of any audio, and with any caption."""


class Written(NamedTuple):
    """A manifest that was written down."""

    source: dict[str, Any]
    """Settings of the source, with what tells whether its own file has changed."""
    manifest: Manifest
    seen: np.ndarray
    """int64 [tracks, 2]: size and time of each track's file, in bytes and ns, as they were."""


def lines(source: Source, manifest: Manifest) -> Iterator[str]:
    """What is written of a manifest that has just been made of `source`."""
    digest = hashlib.sha256()
    for values in chain([{"format": _FORMAT, "source": settings(source)}], _entries(manifest)):
        line = json.dumps(values, separators=(",", ":")) + "\n"
        digest.update(line.encode())
        yield line
    end = {
        "fingerprint": manifest.fingerprint,
        "tracks": len(manifest.tracks),
        "rejects": len(manifest.rejects),
        "ignored": manifest.ignored,
        "sha256": digest.hexdigest(),
    }
    yield json.dumps(end) + "\n"


def _entries(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for track, seen in zip(manifest.tracks, _seen(track.place.path for track in manifest.tracks)):
        yield {
            "path": track.path,
            "id": track.track_id,
            "place": asdict(track.place),
            "captions": track.captions,
            "fields": track.fields,
            "start": track.start,
            "duration": track.duration,
            "seen": seen,
        }
    for reject in manifest.rejects:
        yield {"reject": asdict(reject)}


def settings(source: Source) -> dict[str, Any]:
    """What a manifest depends on, as JSON has it: where the source is, and how it is read."""
    paths = {
        name: path and os.path.abspath(path)
        for name, path in (
            ("audio", source.audio), ("root", source.root), ("metadata", source.metadata),
        )
    }  # fmt: skip
    columns = json.loads(json.dumps(asdict(source.columns)))
    # Of a table or tar that is named itself; a folder's time says little.
    (seen,) = _seen([paths["audio"]]) if os.path.isfile(paths["audio"]) else [None]
    return {**paths, "recipe": source.recipe, "columns": columns, "seen": seen and list(seen)}


def read(found: Iterable[bytes]) -> Written | None:
    """The manifest of what `lines` gave; None for what is damaged, or of another release."""
    digest, tracks, rejects, seen, values = hashlib.sha256(), [], [], [], {}
    try:
        found = iter(found)
        line = next(found)
        header = json.loads(line)
        if header["format"] != _FORMAT:
            return None
        for following in found:
            digest.update(line)
            line = following
            values = json.loads(line)
            if "path" in values:
                tracks.append(_track(values, tracks[-1] if tracks else None))
                seen.append(values["seen"])
            elif "reject" in values:
                rejects.append(Reject(**values["reject"]))
        if (values["tracks"], values["rejects"]) != (len(tracks), len(rejects)):
            return None
        if values["sha256"] != digest.hexdigest():
            return None
        manifest = Manifest(
            tracks=tuple(tracks),
            rejects=tuple(rejects),
            ignored=values["ignored"],
            fingerprint=values["fingerprint"],
        )
        return Written(header["source"], manifest, np.array(seen, np.int64).reshape(-1, 2))
    except (ValueError, KeyError, TypeError, RecursionError, StopIteration):
        return None


def _track(values: dict[str, Any], before: Track | None) -> Track:
    place = values["place"]
    if before is not None and before.place.path == place["path"]:
        place["path"] = before.place.path  # one text in memory for all members of a tar
    kind = RowBytes if "row" in place else FileBytes
    return Track(
        path=values["path"],
        track_id=values["id"],
        place=kind(**place),
        captions=tuple(values["captions"]),
        fields=values["fields"],
        start=values["start"],
        duration=values["duration"],
    )


def is_as_it_was(written: Written, paths: Collection[str]) -> bool:
    """Whether some of its files have the size and the time that they had."""
    tracks, seen = written.manifest.tracks, written.seen.tolist()
    before = {(t.place.path, *s) for t, s in zip(tracks, seen) if t.place.path in paths}
    now = _seen(path for path, *_ in before)
    return all(seen == tuple(was) and seen != _GONE for seen, (_, *was) in zip(now, before))


def _seen(paths: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Size and time of each file; those of many are asked for at once."""
    paths = iter(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(paths, _THREADS * _PATHS_AT_ONCE)):
            parts = (some[i : i + _PATHS_AT_ONCE] for i in range(0, len(some), _PATHS_AT_ONCE))
            for part in pool.map(_seen_here, parts):
                yield from part


def _seen_here(paths: Sequence[str]) -> list[tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for path in paths:
        if path not in found:
            try:
                status = os.stat(path)
                found[path] = (status.st_size, status.st_mtime_ns)
            except OSError:  # whoever opens it says what is wrong
                found[path] = _GONE
    return [found[path] for path in paths]
