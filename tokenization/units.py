"""Shards as units of work: which tracks are in each, and what a finished one left behind."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from magnet_jax.data import records
from magnet_jax.errors import UserError
from tokenization import mixing
from tokenization.place import Place
from tokenization.settings import Job
from tokenization.source.manifest import Manifest
from tokenization.track import Mix, Reject, Track


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The work of one shard."""

    split: str
    index: int
    tracks: Sequence[Track]

    @property
    def is_mixed(self) -> bool:
        return isinstance(self.tracks[0].place, Mix)

    @property
    def records_name(self) -> str:
        """Its record file's, below --out, until the data set is complete."""
        return f"units/{self.split}-{self.index:05d}.array_record"

    @property
    def note_name(self) -> str:
        return f"units/{self.split}-{self.index:05d}.json"


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a finished unit left behind."""

    shard: records.Shard
    seconds: float
    rejects: list[Reject]
    clipped: int
    """Tracks of which more than a thousandth is clipped."""


def split_of(name: str, validation_percent: float) -> str:
    """'train' or 'validation', by a file's path without suffix: adding tracks moves no other."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "validation" if 100 * draw < validation_percent else "train"


def _split(job: Job, track: Track) -> str | None:
    """Where a track goes; None if it is left out."""
    if job.split_by_folder:
        return {"train": "train", "valid": "validation"}.get(track.path.split("/")[0])
    # Parts of one file stay together: validation is of music that training has not heard.
    return split_of(os.path.splitext(track.path)[0], job.validation_percent)


def plan(job: Job, manifest: Manifest) -> list[Unit]:
    """The shards to make; raises `UserError` if no track is left to train on."""
    units = []
    for split in records.SPLITS:
        tracks = [track for track in manifest.tracks if _split(job, track) == split]
        mixes = []
        if split == "train":
            mixes = mixing.draw(tracks, ratio=job.mix_ratio, seed=job.mix_seed, snr=job.mix_snr)
        size = job.tracks_per_shard
        parts = [s[i : i + size] for s in (tracks, mixes) for i in range(0, len(s), size)]
        units += [Unit(split=split, index=i, tracks=part) for i, part in enumerate(parts)]
    if job.split_by_folder and not any(unit.split == "train" for unit in units):
        raise UserError(f"--split-by-folder: no track lies below a folder train of {job.audio}")
    if units and all(unit.split == "validation" for unit in units):
        count = len(manifest.tracks)
        raise UserError(f"all {count} tracks would fall to validation: lower --validation-percent")
    return units


def read_done(place: Place, units: Sequence[Unit]) -> list[Done | None]:
    """What units left behind; None for one that is not done, or whose note is damaged."""
    notes = place.read([unit.note_name for unit in units])
    found: list[Done | None] = []
    for unit in units:
        try:
            values = json.loads(notes[unit.note_name])
            shard = records.Shard(path=Path(unit.records_name), **values["shard"])
            done = Done(
                shard=shard,
                seconds=float(values["seconds"]),
                rejects=[Reject(**reject) for reject in values["rejects"]],
                clipped=int(values["clipped"]),
            )
        except (ValueError, KeyError, TypeError):
            done = None
        found.append(done)
    return found


def finished(place: Place, units: Sequence[Unit], found: Sequence[Done | None]) -> list[bool]:
    """Which units need no work: they left no records, or their file is there and whole.

    The file may have its final name already, which is only given once every unit is done.
    """
    sizes, final = place.sizes(), {}
    if all(found):
        final = {shard.path: name for shard, name in records.final_names(by_split(units, found))}
    return [done is not None and is_whole(done.shard, sizes, final) for done in found]


def is_whole(
    shard: records.Shard, sizes: Mapping[str, int], final: Mapping[Path, str] = MappingProxyType({})
) -> bool:
    """Whether a shard has no records, or its file, perhaps with its final name, has their size."""
    names = [shard.path.as_posix(), final.get(shard.path)]
    return shard.num_examples == 0 or shard.file_bytes in map(sizes.get, names)


def by_split(units: Sequence[Unit], done: Sequence[Done]) -> dict[str, list[records.Shard]]:
    return {
        split: [one.shard for unit, one in zip(units, done) if unit.split == split]
        for split in records.SPLITS
    }


def rejects_of(
    units: Sequence[Unit], found: Sequence[Done | None], *, mixed: bool = False
) -> list[Reject]:
    """What finished units left out: files, or mixes, which are counted by themselves."""
    return [
        reject
        for unit, done in zip(units, found, strict=True)
        if done and unit.is_mixed == mixed
        for reject in done.rejects
    ]
