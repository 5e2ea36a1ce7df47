"""Folders of audio with captions beside it."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from magnet_jax.errors import UserError
from tokenization.intake.audio import SUFFIXES, RejectedError
from tokenization.source import table as tables
from tokenization.source.captions import (
    SIDECARS,
    Sidecars,
    Texts,
    merged_texts,
)
from tokenization.source.paths import (
    Ends,
    IgnoredError,
    Root,
    Task,
    file_ends,
    is_below,
    is_hidden,
    printable,
    refuse,
    same_name,
    split,
)
from tokenization.source.settings import Source
from tokenization.track import FileBytes, Track


def folder_tasks(
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
    entries = entries_of(os.path.normpath(os.path.join(root.given, below)))
    folders = {entry.name for entry in entries if is_folder(entry)}
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
                yield from folder_tasks(source, root, sidecars, ignored, f"{path}/", listings)
            else:
                yield from _linked_tasks(root, entry.path, path)
        elif suffix in SUFFIXES:
            rows = [row for listing in listings for row in listing.take(path)]
            for listing in listings:
                listing.is_used |= stem not in captioned
            if stem in taken:
                yield printable(path), refuse("same name", same_name(taken[stem]))
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


def _linked_tasks(root: Root, where: str, path: str) -> Iterator[Task]:
    """Of a linked folder: a refusal, or nothing if it is met where it really is."""
    real = os.path.realpath(where)
    if not is_below(real, root.real):
        yield printable(path), refuse("outside the folder", "a link out of the folder")
    elif is_hidden(os.path.relpath(real, root.real)) and holds_audio(Path(real)):
        detail = "a link to a folder below a name that begins with a dot"
        yield printable(path), refuse("hidden", detail)


def entries_of(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as listed:
            return [entry for entry in listed if not is_hidden(entry.name)]
    except OSError as error:
        # Its tracks would be missing without a word.
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None


def holds_audio(folder: Path) -> bool:
    """Anywhere below."""
    names = (name for _, _, names in os.walk(folder) for name in names)
    return any(split(name)[1] in SUFFIXES for name in names if not is_hidden(name))


def is_folder(entry: os.DirEntry) -> bool:
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
        raise IgnoredError(suffix or "none") from None
    raise RejectedError("unknown format", suffix or "no suffix")
