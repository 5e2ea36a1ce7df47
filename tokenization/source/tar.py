"""Webdatasets: tars whose neighbours of one name are a sample."""

import functools
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenization.intake.audio import SUFFIXES, RejectedError, open_bytes
from tokenization.source.captions import (
    SIDECARS,
    read_caption,
    read_json,
    read_text,
)
from tokenization.source.paths import (
    Ends,
    Task,
    check_name,
    is_hidden,
    open_listing,
    printable,
    range_ends,
    refuse,
    refuse_metadata,
    same_name,
    split,
)
from tokenization.source.settings import Source
from tokenization.track import FileBytes, Track


def tar_tasks(source: Source, paths: list[Path], ignored: Counter[str]) -> Iterator[Task]:
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
        # Of sizes that no file can have the library knows nothing.
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
            yield shown, refuse("same name", same_name(os.path.basename(audio[0].name)))
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
    if member.size == 0:  # and a copy of no other
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
