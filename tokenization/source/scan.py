"""Who is there: the tracks of a folder, manifest, table, tar or saved data set, in a fixed order.

`scan` decodes nothing. Of every file it takes the size and both ends, of captions all.
"""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from magnet_jax.errors import PassingError, UserError
from tokenization.intake.audio import SUFFIXES, RejectedError, is_outage, open_bytes
from tokenization.source import table as tables
from tokenization.source.audiocraft import manifest_tasks
from tokenization.source.captions import (
    CAPTION_NAMES,
    Sidecars,
    merged_texts,
)
from tokenization.source.folder import entries_of, folder_tasks, holds_audio, is_folder
from tokenization.source.manifest import Manifest
from tokenization.source.paths import (
    Ends,
    IgnoredError,
    Make,
    Root,
    Task,
    check_below,
    printable,
    split,
)
from tokenization.source.rows import read_rows
from tokenization.source.settings import Source
from tokenization.source.tar import tar_tasks
from tokenization.track import FileBytes, Reject, RowBytes, Track, part_of

_MANIFESTS = ("data.jsonl", "data.jsonl.gz", "data.jsons", "data.jsons.gz")
_THREADS = 16  # mostly waiting for the disk or the network
_TASKS_AT_ONCE = 64


def scan(source: Source) -> Manifest:
    """Lists the tracks of a source with their captions.

    Audio with the same bytes as an earlier track is rejected. In folders, names that begin with a
    dot are passed over, links that lead out, or to audio below such a name, are rejected, other
    linked folders are not entered, of files that differ in their suffix only the first counts, and
    a captioned file of another suffix is rejected as audio that cannot be read. Rows of one clip
    become one track of all their captions and fields.
    Raises `UserError` if the source cannot be read, or holds no audio.
    """
    ignored: Counter[str] = Counter()
    roll = _Roll(source.columns.id)
    sidecars = Sidecars(source)
    tasks = _tasks(source, sidecars, ignored, roll.digest)
    with tqdm(_in_order(tasks), desc="scanning", unit="file", delay=2, leave=False) as bar:
        for path, result in bar:
            if isinstance(result, IgnoredError):
                ignored[result.args[0]] += 1
            elif isinstance(result, RejectedError):
                roll.refuse(path, result)
            else:
                roll.add(path, *result)
    _check_found(source, roll, ignored)
    copies = _copies(roll.tracks, roll.ends)
    left_out = copies | _of_one_name(roll.tracks, copies, sidecars.by_name)
    return Manifest(
        tracks=tuple(track for i, track in enumerate(roll.tracks) if i not in left_out),
        rejects=(*roll.rejects, *left_out.values()),
        ignored=dict(ignored),
        fingerprint=roll.digest.hexdigest(),
    )


class _Roll:
    """Tracks in their order, each once, with a hash of all that was seen.

    id_column: where rows of one clip may differ in it, all its values are kept.
    """

    def __init__(self, id_column: str | None):
        self.tracks: list[Track] = []
        self.ends: list[Ends | None] = []
        self.rejects: list[Reject] = []
        self.digest = hashlib.sha256()
        self._id_column = id_column
        self._names: set[str] = set()
        self._clips: dict[tuple, int] = {}  # in `tracks`

    def add(self, path: str, track: Track, ends: Ends | None) -> None:
        self.digest.update(_described_track(track, ends))
        # In tars files of one name may be different ones.
        clip = (track.path, track.place, track.start, track.duration)
        if (i := self._clips.get(clip)) is not None:
            self.tracks[i] = _merged(self.tracks[i], track, self._id_column)
        elif track.track_id in self._names:
            detail = f"another track is called {track.track_id}"
            self.refuse(path, RejectedError("duplicate", detail))
        else:
            self._names.add(track.track_id)
            self._clips[clip] = len(self.tracks)
            self.tracks.append(track)
            self.ends.append(ends)

    def refuse(self, path: str, error: RejectedError) -> None:
        self.rejects.append(Reject(path=path, reason=error.reason, detail=error.detail))
        self.digest.update(f"{path}\n{error.reason}\n".encode())


def _check_found(source: Source, roll: _Roll, ignored: Mapping[str, int]) -> None:
    """Raises `UserError` if there is no audio at all."""
    rejects = roll.rejects
    if roll.tracks:
        return
    if not rejects:
        raise UserError(f"audio {source.audio}: no audio in it ({describe_ignored(ignored)})")
    if {reject.reason for reject in rejects} <= {"outside the folder", "missing"}:
        raise UserError(
            f"audio {source.audio}: none of its {len(rejects)} files is there "
            f"({rejects[0].path}: {rejects[0].detail}); --root names the folder they are below"
        )


def _of_one_name(
    tracks: list[Track], copies: Container[int], by_name: Mapping[str, str]
) -> dict[int, Reject]:
    """The tracks whose caption was found by a name that other audio goes by as well."""
    takers: dict[str, list[int]] = {}
    for i, track in enumerate(tracks):
        if i not in copies and track.track_id in by_name:
            takers.setdefault(by_name[track.track_id], []).append(i)
    rejects = {}
    for name, several in takers.items():
        for i, other in zip(several, several[1:] + several[:1]):
            if other != i:
                detail = (
                    f"{name} in --metadata may be about {tracks[other].path} instead; put a .json "
                    "beside each"
                )
                rejects[i] = Reject(path=tracks[i].path, reason="ambiguous", detail=detail)
    return rejects


def _merged(first: Track, later: Track, id_column: str | None) -> Track:
    """One track of two rows about it, in which nothing of the later one is lost."""
    texts = (later.captions, later.fields)
    if id_column is not None and later.track_id != first.track_id:
        fields = json.loads(first.fields)
        earlier_ids = {id_column: fields.get(id_column, first.track_id)}
        first = replace(first, fields=json.dumps(fields | earlier_ids, sort_keys=True))
        later_id = {id_column: later.track_id}
        texts = (later.captions, json.dumps(json.loads(later.fields) | later_id))
    captions, fields = merged_texts((first.captions, first.fields), texts)
    return replace(first, captions=captions, fields=fields)


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """For people: what kinds of other files there were."""
    if not ignored:
        return "no other files"
    kinds = sorted(ignored.items(), key=lambda kind: (-kind[1], kind[0]))[:5]
    names = ", ".join(f"{count} {printable(suffix)}" for suffix, count in kinds)
    return f"{sum(ignored.values())} other files: {names}"


def _tasks(
    source: Source, sidecars: Sidecars, ignored: Counter[str], digest: "hashlib._Hash"
) -> Iterator[Task]:
    """Finds out what kind of source it is."""
    audio = source.audio
    for option, folder in (("--root", source.root), ("--metadata", source.metadata)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option} {folder}: no such folder")
    if not audio.exists():
        raise UserError(f"audio {audio}: no such file or folder")
    if audio.is_dir():
        return _tasks_within(source, sidecars, ignored, digest)
    if not audio.is_file():
        raise UserError(f"audio {audio}: neither a file nor a folder")
    name = audio.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsons", ".jsons.gz")):
        return _lines_tasks(source, sidecars, audio, "a manifest")
    if name.endswith((".csv", ".tsv")):
        return tables.text_tasks(source, audio)
    if name.endswith(".parquet"):
        return tables.parquet_tasks(source, [audio], digest)
    if name.endswith(".tar"):
        _refuse_columns(source, "a tar")
        return tar_tasks(source, [audio], ignored)
    if name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
        raise UserError(f"audio {audio}: a compressed tar cannot be read in parts; unpack it once")
    raise UserError(f"audio {audio}: neither a folder nor a .jsonl, .csv, .tsv, .parquet or .tar")


def _lines_tasks(source: Source, sidecars: Sidecars, path: Path, what: str) -> Iterator[Task]:
    """Of a .jsonl: a table if there are captions in it, or else AudioCraft's manifest."""
    names, _ = read_rows(path)
    captions = source.columns.caption or CAPTION_NAMES
    if names and ("path" not in names or set(captions) & set(names)):
        return tables.text_tasks(source, path)
    _refuse_columns(source, what)
    return manifest_tasks(source, sidecars, path)


def _refuse_columns(source: Source, what: str) -> None:
    """Raises `UserError` for options about tables, where there is none."""
    columns = source.columns
    given = ["--recipe"] if source.recipe else []
    names = ("path", "start", "duration", "end", "id")
    given += [f"--columns.{name}" for name in names if getattr(columns, name) is not None]
    if given:
        raise UserError(f"{', '.join(given)}: for tables; {source.audio} is {what}")


def _tasks_within(
    source: Source, sidecars: Sidecars, ignored: Counter[str], digest: "hashlib._Hash"
) -> Iterator[Task]:
    """Finds out what a folder is."""
    audio = source.audio
    entries = entries_of(audio)
    folders = sorted(entry.name for entry in entries if is_folder(entry))
    names = sorted({entry.name for entry in entries}.difference(folders))
    suffixes = {split(name)[1] for name in names}
    manifests = [name for name in _MANIFESTS if name in names]
    if manifests:
        return _lines_tasks(source, sidecars, audio / manifests[0], "a folder with a manifest")
    if "dataset_dict.json" in names:
        splits = ", ".join(str(audio / name) for name in folders)
        raise UserError(f"audio {audio}: several splits; name one of {splits}")
    if "state.json" in names and "dataset_info.json" in names:
        files = tables.saved_files(audio)
        check_below(source.root or audio, files)
        return tables.arrow_tasks(source, files)
    shards = [name for name in names if split(name)[1] in (".tar", ".parquet")]
    if shards and not suffixes & SUFFIXES:
        others = [name for name in folders if holds_audio(audio / name)]
        if others or {".tar", ".parquet"} <= suffixes:
            firsts = {split(name)[1]: name for name in reversed(shards)}
            what = ", ".join(map(printable, [*sorted(firsts.values()), *others[:3]]))
            raise UserError(f"audio {audio}: several kinds in it ({what}); name one file or folder")
        files = [audio / name for name in shards]
        check_below(source.root or audio, files)
        if ".tar" in suffixes:
            _refuse_columns(source, "a folder of tars")
            return tar_tasks(source, files, ignored)
        return tables.parquet_tasks(source, files, digest)
    _refuse_columns(source, "a folder of audio")
    return folder_tasks(source, Root(audio), sidecars, ignored)


def _in_order(tasks: Iterator[Task]) -> Iterator[tuple[str, Any]]:
    """(path, what the task returned or why it refused) of each; many are done at once."""

    def run(some: list[Task]) -> list[tuple[str, Any]]:
        return [(path, _result(make)) for path, make in some]

    pool = ThreadPoolExecutor(_THREADS)
    waiting: deque = deque()
    try:
        while some := list(islice(tasks, _TASKS_AT_ONCE)):
            waiting.append(pool.submit(run, some))
            if len(waiting) > 4 * _THREADS:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _result(make: Make) -> tuple[Track, Ends | None] | Exception:
    try:
        return make()
    except (RejectedError, IgnoredError) as error:
        return error
    except OSError as error:
        _check_outage(error)
        return RejectedError("unreadable", error.strerror or str(error))


def _check_outage(error: OSError) -> None:
    if is_outage(error):
        where = "audio" if error.filename is None else printable(os.fsdecode(error.filename))
        raise PassingError(f"{where}: out of reach ({error.strerror})") from None


def _described_track(track: Track, ends: Ends | None) -> bytes:
    texts = (track.captions, track.fields)
    place = track.place
    column = (place.kind, place.column) if isinstance(place, RowBytes) else None
    parts = (track.path, track.track_id, track.start, track.duration, texts, column)
    return repr((parts, ends and ends.digest)).encode()


def _copies(tracks: list[Track], ends: list[Ends | None]) -> dict[int, Reject]:
    """The tracks whose audio is that of an earlier one."""
    first: dict[Any, int] = {}
    alike: dict[int, list[int]] = {}
    for i, (track, its_ends) in enumerate(zip(tracks, ends)):
        if its_ends is not None:
            key = (its_ends.digest, track.start, track.duration)
            if key in first:
                alike.setdefault(first[key], []).append(i)
            else:
                first[key] = i
    del first
    # What is alike in size and at both ends is read in full, but for parts of one and the same.
    doubtful = {
        tracks[i].place
        for one, others in alike.items()
        if not ends[one].whole
        for i in (one, *others)
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = dict(zip(doubtful, pool.map(_hash, doubtful)))
    copies = {}
    for one, others in alike.items():
        known: dict[Any, int] = {}
        for i in (one, *others):
            earlier = known.setdefault(hashes.get(tracks[i].place), i)
            if earlier != i:
                detail = f"the same bytes as {tracks[earlier].path}{part_of(tracks[i])}"
                copies[i] = Reject(path=tracks[i].path, reason="duplicate", detail=detail)
    return copies


def _hash(place: FileBytes | RowBytes) -> bytes:
    """Of all bytes; of a file that cannot be read, something that no other has."""
    try:
        with open_bytes(place) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        _check_outage(error)
        return repr(place).encode()
