"""The Hugging Face hub: which names mean a repository there, and how its files come here."""

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from magnet_jax.errors import UserError, first_line


def is_hub_id(source: str) -> bool:
    """Whether `source` is spelled like a repository: 'owner/name', or 'name' as for 't5-base'."""
    return bool(re.fullmatch(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", source))


def fetch(source: str, patterns: Sequence[str], what: str, instead: str = "") -> Path:
    """The folder that holds those files of a repository: fetched, or found in the hub's cache.

    Raises `UserError` where that fails: it says `what` the files are, and what to name `instead`,
    by default a folder with these files, or 'embedded'.
    """
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises a dozen unrelated kinds
        instead = instead or (
            f"a folder with {', '.join(patterns)}, or 'embedded' for what ships with this package"
        )
        raise UserError(
            f"{what} {source!r}: no such folder, and not to be had from the Hugging Face hub "
            f"({type(error).__name__}: {first_line(error)}); offline, name {instead}"
        ) from None


def cached_file(source: str, name: str) -> Path | None:
    """A repository's file if it was fetched before; asks nobody."""
    path = huggingface_hub.try_to_load_from_cache(source, name)
    return Path(path) if isinstance(path, str) else None
