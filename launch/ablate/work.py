"""Runs and cells, each made once, by whichever process comes to it first."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from magnet_jax.errors import UserError
from magnet_jax.io import files, ledger


class Piece(NamedTuple):
    """A run or a cell: a folder that all studies share."""

    label: str
    """What is done to make it, for people."""
    folder: Path
    end: str
    """What lies in the folder once the piece is made."""
    settings: Mapping[str, Any]
    """All that it depends on."""
    needs: tuple["Piece", ...]
    """What must be made before."""
    make: Callable[[], Any]
    """Goes on where it was stopped."""

    @property
    def is_made(self) -> bool:
        return (self.folder / self.end).exists()

    @property
    def claim(self) -> Path:
        """Beside the folder: what it was begun with."""
        return self.folder.with_name(f"{self.folder.name}.json")


def make_all(pieces: Sequence[Piece], out: Path, after_each: Callable[[], Any]) -> None:
    """Makes the pieces that are not made yet.

    Another process may be at some of them: those are waited for last.

    Args:
      pieces: in the order in which they are to be made.
      out: the folder of all studies, where their locks lie.
      after_each: called after each that was made here.
    """
    began, wait = time.perf_counter(), False
    while left := [piece for piece in pieces if not piece.is_made]:
        for piece in left:
            if not all(need.is_made for need in piece.needs):
                continue
            done = sum(piece.is_made for piece in pieces)
            title = f"[{done} of {len(pieces)} done, {time.perf_counter() - began:.0f} s]"
            if make(piece, out, f"\n{title} {piece.label}", wait):
                after_each()
            if wait:
                break
        wait = left == [piece for piece in pieces if not piece.is_made]


def make(piece: Piece, out: Path, title: str, wait: bool) -> bool:
    """Makes a piece; False where another process is at it, or has made it meanwhile."""
    with held(out, piece.folder, wait) as mine:
        if not mine or piece.is_made:
            return False
        print(title, flush=True)
        claim(piece)
        piece.make()
    return True


def held(out: Path, folder: Path, wait: bool):
    """Keeps other processes from what is made in a folder; False where one is at it, unless it is
    to `wait`."""
    path = out / "locks" / f"{folder.parent.name}-{folder.name}"
    return files.held(path, f"waiting for the process that is at {folder}" if wait else None)


def claim(piece: Piece) -> None:
    """Notes what a piece is begun with.

    Raises `UserError` if it was begun with other settings, or by something else.
    """
    if piece.folder.exists() and not piece.claim.exists():
        raise UserError(f"{piece.folder}: was not made by launch.ablate; name another --out")
    advice = f"give these, name another --out, or remove it and {piece.claim.name}"
    ledger.claim(piece.claim, piece.settings, where=str(piece.folder), advice=advice)
