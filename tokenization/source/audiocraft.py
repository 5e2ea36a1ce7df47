"""AudioCraft's manifests: a line of JSON a file, with its metadata elsewhere."""

import functools
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from magnet_jax.errors import UserError
from tokenization.intake.audio import RejectedError, is_outage
from tokenization.source.captions import (
    Sidecars,
    TwiceError,
    load_json,
    read_caption,
    read_json,
)
from tokenization.source.paths import (
    Ends,
    Root,
    Task,
    open_listing,
    open_regular,
    printable,
)
from tokenization.source.settings import Source
from tokenization.track import FileBytes, Track


def manifest_tasks(source: Source, sidecars: Sidecars, path: Path) -> Iterator[Task]:
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
    # RuntimeError: encrypted, or compressed in a way that zipfile does not know.
    except (OSError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and is_outage(error):
            raise
        raise RejectedError("no caption", f"{info_path} cannot be read") from None
