"""Who is there: the tracks of a folder, manifest, table, tar or saved data set, in a fixed order.

`scan` decodes nothing. Of every file it takes the size and both ends, of captions all.
"""

import functools
import hashlib
import itertools
import json
import os
import tarfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from magnet_jax.errors import PassingError, UserError
from tokenization.intake.audio import SUFFIXES, RejectedError, is_outage, open_bytes
from tokenization.source import table as tables
from tokenization.source.manifest import Manifest
from tokenization.source.paths import (
    CAPTION_NAMES,
    SIDECARS,
    Ends,
    Make,
    Root,
    Sidecars,
    Task,
    Texts,
    TwiceError,
    check_below,
    check_name,
    file_ends,
    is_below,
    is_hidden,
    load_json,
    merged_texts,
    open_listing,
    open_regular,
    printable,
    range_ends,
    read_caption,
    read_json,
    read_text,
    refuse,
    refuse_metadata,
    split,
)
from tokenization.source.rows import read_rows
from tokenization.source.settings import Source
from tokenization.track import FileBytes, Reject, RowBytes, Track, part_of

_MANIFESTS = ("data.jsonl", "data.jsonl.gz", "data.jsons", "data.jsons.gz")
_THREADS = 16  # mostly waiting for the disk or the network
_TASKS_AT_ONCE = 64


class _IgnoredError(Exception):
    """Raised by a task whose file is no track, and nobody's mistake."""


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
    digest = hashlib.sha256()
    tracks: list[Track] = []
    ends: list[Ends | None] = []
    rejects: list[Reject] = []
    names: set[str] = set()
    clips: dict[tuple, int] = {}  # in `tracks`
    sidecars = Sidecars(source)
    tasks = _tasks(source, sidecars, ignored, digest)
    with tqdm(_in_order(tasks), desc="scanning", unit="file", delay=2, leave=False) as bar:
        for path, result in bar:
            if isinstance(result, _IgnoredError):
                ignored[result.args[0]] += 1
                continue
            if not isinstance(result, RejectedError):
                track, its_ends = result
                digest.update(_described_track(track, its_ends))
                # (in tars files of one name may be different ones)
                clip = (track.path, track.place, track.start, track.duration)
                if clip in clips:
                    earlier = tracks[clips[clip]]
                    tracks[clips[clip]] = _merged(earlier, track, source.columns.id)
                    continue
                if track.track_id not in names:
                    names.add(track.track_id)
                    clips[clip] = len(tracks)
                    tracks.append(track)
                    ends.append(its_ends)
                    continue
                detail = f"another track is called {track.track_id}"
                result = RejectedError("duplicate", detail)
            rejects.append(Reject(path=path, reason=result.reason, detail=result.detail))
            digest.update(f"{path}\n{result.reason}\n".encode())
    if not tracks and not rejects:
        raise UserError(f"audio {source.audio}: no audio in it ({describe_ignored(ignored)})")
    if not tracks and {reject.reason for reject in rejects} <= {"outside the folder", "missing"}:
        raise UserError(
            f"audio {source.audio}: none of its {len(rejects)} files is there "
            f"({rejects[0].path}: {rejects[0].detail}); --root names the folder they are below"
        )
    del names, clips
    copies = _copies(tracks, ends)
    rejects += [
        Reject(
            path=tracks[i].path,
            reason="duplicate",
            detail=f"the same bytes as {tracks[first].path}{part_of(tracks[i])}",
        )
        for i, first in copies.items()
    ]
    ambiguous = _of_one_name(tracks, copies, sidecars.by_name)
    rejects += ambiguous.values()
    return Manifest(
        tracks=tuple(t for i, t in enumerate(tracks) if i not in copies and i not in ambiguous),
        rejects=tuple(rejects),
        ignored=dict(ignored),
        fingerprint=digest.hexdigest(),
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
        return _tar_tasks(source, [audio], ignored)
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
    return _manifest_tasks(source, sidecars, path)


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
    entries = _entries(audio)
    folders = sorted(entry.name for entry in entries if _is_folder(entry))
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
        others = [name for name in folders if _holds_audio(audio / name)]
        if others or {".tar", ".parquet"} <= suffixes:
            firsts = {split(name)[1]: name for name in reversed(shards)}
            what = ", ".join(map(printable, [*sorted(firsts.values()), *others[:3]]))
            raise UserError(f"audio {audio}: several kinds in it ({what}); name one file or folder")
        files = [audio / name for name in shards]
        check_below(source.root or audio, files)
        if ".tar" in suffixes:
            _refuse_columns(source, "a folder of tars")
            return _tar_tasks(source, files, ignored)
        return tables.parquet_tasks(source, files, digest)
    _refuse_columns(source, "a folder of audio")
    return _folder_tasks(source, Root(audio), sidecars, ignored)


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
    except (RejectedError, _IgnoredError) as error:
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


def _copies(tracks: list[Track], ends: list[Ends | None]) -> dict[int, int]:
    """The tracks whose audio is that of an earlier one, and of which."""
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
                copies[i] = earlier
    return copies


def _hash(place: FileBytes | RowBytes) -> bytes:
    """Of all bytes; of a file that cannot be read, something that no other has."""
    try:
        with open_bytes(place) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        _check_outage(error)
        return repr(place).encode()


# --- folders ------------------------------------------------------------------------------------


def _folder_tasks(
    source: Source,
    root: Root,
    sidecars: Sidecars,
    ignored: Counter[str],
    below: str = "",
    listings: tuple[tables.Listed, ...] = (),
) -> Iterator[Task]:
    """In the byte order of their paths; `below` is a path in the folder, with its slash.

    listings: of the folders above, which may name files in this one.
    """
    entries = _entries(os.path.normpath(os.path.join(root.given, below)))
    folders = {entry.name for entry in entries if _is_folder(entry)}
    entries.sort(key=lambda entry: os.fsencode(entry.name + "/" * (entry.name in folders)))
    names = {entry.name for entry in entries} - folders
    stems = {stem for stem, suffix in map(split, names) if suffix in SUFFIXES}
    others = {stem for stem, suffix in map(split, names) if suffix not in (".json", ".txt")}
    captioned = {split(name)[0] for name in names if name.endswith(SIDECARS)}
    listed = tables.listed_in(source, root, below, names)
    listings = (listed, *listings) if listed else listings
    taken: dict[str, str] = {}
    for entry in entries:
        path = below + entry.name
        stem, suffix = split(entry.name)
        if entry.name in folders:
            if not entry.is_symlink():
                yield from _folder_tasks(source, root, sidecars, ignored, f"{path}/", listings)
            else:
                yield from _linked_tasks(root, entry.path, path)
        elif suffix in SUFFIXES:
            rows = [row for listing in listings for row in listing.take(path)]
            for listing in listings:
                listing.is_used |= stem not in captioned
            if stem in taken:
                yield printable(path), refuse("same name", _same_name(taken[stem]))
            else:
                taken[stem] = entry.name
                yield printable(path), functools.partial(_folder_track, root, sidecars, path, rows)
        elif suffix in (".json", ".txt"):
            beside = stems if suffix == ".txt" else others
            if stem not in beside or not entry.name.endswith(SIDECARS):
                ignored[suffix] += 1
        elif stem in stems or stem not in captioned:
            if listed is None or entry.name != listed.name:
                ignored[suffix or "none"] += 1
        else:
            yield printable(path), functools.partial(_unknown_format, root, sidecars, path, suffix)
    if listed:
        yield from listed.left(root)


def _same_name(first: str) -> str:
    return f"{printable(first)} goes by the same name, and may be other audio; rename one"


def _linked_tasks(root: Root, where: str, path: str) -> Iterator[Task]:
    """Of a linked folder: a refusal, or nothing if it is met where it really is."""
    real = os.path.realpath(where)
    if not is_below(real, root.real):
        yield printable(path), refuse("outside the folder", "a link out of the folder")
    elif is_hidden(os.path.relpath(real, root.real)) and _holds_audio(Path(real)):
        detail = "a link to a folder below a name that begins with a dot"
        yield printable(path), refuse("hidden", detail)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as listed:
            return [entry for entry in listed if not is_hidden(entry.name)]
    except OSError as error:
        # (its tracks would be missing without a word)
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None


def _holds_audio(folder: Path) -> bool:
    """Anywhere below."""
    names = (name for _, _, names in os.walk(folder) for name in names)
    return any(split(name)[1] in SUFFIXES for name in names if not is_hidden(name))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _folder_track(
    root: Root, sidecars: Sidecars, path: str, rows: list[Callable[[], Texts]]
) -> tuple[Track, Ends]:
    try:
        real = root.resolve(path)
        ends = file_ends(real)
    except FileNotFoundError:
        raise RejectedError("unreadable", "a link to nothing") from None
    track_id = os.path.splitext(path)[0]
    try:
        captions, fields = sidecars.read(root, track_id)
    except RejectedError:
        if not rows:
            raise
        captions, fields = functools.reduce(merged_texts, [read() for read in rows])
    track = Track(
        path=path, track_id=track_id, place=FileBytes(path=real), captions=captions, fields=fields
    )
    return track, ends


def _unknown_format(root: Root, sidecars: Sidecars, path: str, suffix: str) -> tuple[Track, Ends]:
    try:
        sidecars.read(root, os.path.splitext(path)[0])
    except RejectedError:
        raise _IgnoredError(suffix or "none") from None
    raise RejectedError("unknown format", suffix or "no suffix")


# --- AudioCraft's manifests ---------------------------------------------------------------------


def _manifest_tasks(source: Source, sidecars: Sidecars, path: Path) -> Iterator[Task]:
    root = Root(source.root or path.parent)
    open_zip = functools.lru_cache(8)(lambda name: zipfile.ZipFile(open_regular(name)))
    number = 0
    with open_listing(path) as file:
        try:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                meta = load_json(line)
                its_path, info_path = meta["path"], meta.get("info_path")
                if not isinstance(its_path, str) or not isinstance(info_path, str | None):
                    raise TypeError
                make = functools.partial(
                    _manifest_track, source, root, sidecars, its_path, info_path, open_zip
                )
                yield printable(its_path), make
        except TwiceError as error:
            raise UserError(f"{path}: line {number}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{path}: line {number} is not a JSON object with a 'path'") from None
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: damaged after line {number} ({error})") from None


def _manifest_track(
    source: Source,
    root: Root,
    sidecars: Sidecars,
    path: str,
    info_path: str | None,
    open_zip: Callable[[str], zipfile.ZipFile],
) -> tuple[Track, Ends]:
    real, below, ends = root.find(path)
    track_id = os.path.splitext(below)[0]
    if info_path is None:
        captions, fields = sidecars.read(root, track_id)
    else:
        content = _read_info(root, info_path, open_zip)
        captions, fields = read_json(content, os.path.basename(info_path), source.columns)
    track = Track(
        path=below, track_id=track_id, place=FileBytes(path=real), captions=captions, fields=fields
    )
    return track, ends


def _read_info(root: Root, info_path: str, open_zip: Callable[[str], zipfile.ZipFile]) -> bytes:
    """The content of a file, or of one in a zip archive: 'some.zip:name/in/it.json'."""
    archive, colon, name = info_path.partition(".zip:")
    try:
        if colon:
            opened = open_zip(root.resolve(archive + ".zip")).open(name.lstrip("/"))
        else:
            opened = open_regular(root.resolve(info_path))
        with opened as file:
            return read_caption(file, os.path.basename(info_path))
    # (RuntimeError: encrypted, or compressed in a way that zipfile does not know)
    except (OSError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and is_outage(error):
            raise
        raise RejectedError("no caption", f"{info_path} cannot be read") from None


# --- tars ---------------------------------------------------------------------------------------


def _tar_tasks(source: Source, paths: list[Path], ignored: Counter[str]) -> Iterator[Task]:
    """Webdataset: neighbours whose names are alike up to the first dot are one sample."""
    refuse_metadata(source, source.audio)
    for path in paths:
        count = 0
        try:
            with open_listing(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for key, members in itertools.groupby(_regular(tar, ignored), _key):
                    members = list(members)
                    count += len(members)
                    yield from _sample_tasks(source, path, key, members, ignored)
                _check_end(path, tar.offset)
        # (of sizes that no file can have the library knows nothing)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            detail = f"after {count} whole files: {error}"
            yield printable(path.name), refuse("damaged tar", detail)


def _check_end(path: Path, end: int) -> None:
    """Raises `TarError` unless a tar ends as it should where its members do, with zeros alone.

    The library takes a damaged header for the end, and the end of the file.
    """
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("cut off")
        while block:
            if block.strip(b"\0"):
                raise tarfile.ReadError("a damaged header, or another tar")
            block = file.read(2**20)


def _regular(tar: tarfile.TarFile, ignored: Counter[str]) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.size < 0:  # the next one would be this one again
            raise tarfile.ReadError("a size below 0")
        if is_hidden(member.name):
            if not member.isdir():
                ignored["hidden files within tars"] += 1
        elif member.isreg():
            yield member
        elif not member.isdir():
            ignored["links and the like within tars"] += 1


def _key(member: tarfile.TarInfo) -> str:
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.partition(".")[0])


def _sample_tasks(
    source: Source, path: Path, key: str, members: list[tarfile.TarInfo], ignored: Counter[str]
) -> Iterator[Task]:
    audio = []
    captions = {}
    for member in members:
        suffix = split(member.name)[1]
        if suffix in SUFFIXES:
            audio.append(member)
        elif member.name[len(key) :] in SIDECARS:
            captions[suffix] = member
        else:
            ignored[suffix or "none"] += 1
    for i, member in enumerate(audio):
        shown = printable(f"{path.name}/{member.name}")
        if i > 0:
            yield shown, refuse("same name", _same_name(os.path.basename(audio[0].name)))
        else:
            yield shown, functools.partial(_tar_track, source, path, member, key, captions)


def _tar_track(
    source: Source,
    path: Path,
    member: tarfile.TarInfo,
    key: str,
    captions: dict[str, tarfile.TarInfo],
) -> tuple[Track, Ends]:
    check_name(member.name)
    place = _member_bytes(path, member)
    if member.size == 0:  # (and a copy of no other)
        raise RejectedError("empty", "a file of 0 bytes")
    for suffix, read in ((".json", read_json), (".txt", read_text)):
        if suffix in captions:
            name = f"{key}{suffix}"
            with open_bytes(_member_bytes(path, captions[suffix])) as file:
                texts, fields = read(read_caption(file, name), name, source.columns)
            break
    else:
        raise RejectedError("no caption", f"no {key}.json or {key}.txt beside it")
    track = Track(
        path=f"{printable(path.name)}/{member.name}",
        track_id=f"{printable(path.stem)}/{key}",
        place=place,
        captions=texts,
        fields=fields,
    )
    return track, range_ends(place.path, place.offset, member.size)


def _member_bytes(path: Path, member: tarfile.TarInfo) -> FileBytes:
    if member.issparse():
        raise RejectedError("sparse file", f"{member.name} is in pieces; write the tar without -S")
    return FileBytes(path=os.path.realpath(path), offset=member.offset_data, size=member.size)
