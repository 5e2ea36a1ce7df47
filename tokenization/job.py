"""Tokenizes audio with its captions: python -m tokenization.job --audio SOURCE --out DIR.

The tracks of each split are cut into shards, in the order that their source has them. A shard is
one unit of work and a function of the manifest alone; the small .json file that is written when its
records are on disk marks it as done. Killed at any moment and run again, the job goes on with the
next shard and ends with the same bytes.

    DIR/job.json        what this folder was begun with; another job there is refused
    DIR/units/          finished shards until the end, then their .json files only
    DIR/rejects.jsonl   one line a file left out: path, reason, detail
    DIR/tokens-*        the data set, see magnet_jax/records.py
"""

import fcntl
import hashlib
import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from launch import cli
from magnet_jax import records
from magnet_jax.codec import Codec, load_codec
from magnet_jax.config import EMBEDDED, CodecSpec
from magnet_jax.errors import UserError, reported
from tokenization.audio import CLIPPED, Facts, Intake, Reject, RejectedError, Track
from tokenization.decoder import read_audio, readers
from tokenization.listing import Source
from tokenization.sources import Manifest, describe_ignored, scan


@dataclass(frozen=True, kw_only=True)
class Job(Source):
    """Turns audio with captions into a data set of EnCodec tokens.

    Run the same command again to go on after an interruption.
    """

    out: Path
    """Folder of the data set."""
    codec: str = EMBEDDED
    """'embedded', folder or hub id of a transformers EncodecModel (facebook/encodec_32khz),
    encodec_24khz, encodec_48khz, or the path of one of those two's weights."""
    num_codebooks: int | None = None
    """Codebooks to keep; by default those of the codec's largest bandwidth up to 6 kbit/s."""
    max_reject_ratio: float = 0.1
    """End with an error if a larger share of the audio files is rejected."""
    validation_percent: float = 5.0
    """Share of the tracks, chosen by a hash of their files' names, that is kept for validation."""
    min_seconds: float = 1.0
    """Reject shorter tracks."""
    max_clipped: float = 1.0
    """Reject tracks of which a larger share is clipped, that is in runs at full scale."""
    max_record_seconds: float = 120.0
    """Cut longer tracks into records of equal length; at most 120."""
    tracks_per_shard: int = 128
    """Tracks in a record file: the work lost by a kill, at most."""
    batch_size: int = 8
    """Records of equal length encoded at once; never more audio than one longest record has."""
    readers: int = 2
    """Processes that decode and resample audio ahead of the codec."""
    decode_timeout: float = 60.0
    """Reject a file that its decoder makes no progress with for so many seconds."""
    device: str = "cpu"
    """Torch device of the codec: cpu, cuda, cuda:1, ...; one kind for the whole folder."""


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """The work of one shard."""

    split: str
    index: int
    tracks: Sequence[Track]

    def record_path(self, out: Path) -> Path:
        return out / "units" / f"{self.split}-{self.index:05d}.array_record"

    def done_path(self, out: Path) -> Path:
        return out / "units" / f"{self.split}-{self.index:05d}.json"


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What a finished unit left behind."""

    shard: records.Shard
    seconds: float
    rejects: list[Reject]
    clipped: int
    """Tracks of which more than a thousandth is clipped."""


def run(job: Job) -> str:
    """Runs a job to its end and returns the summary; raises `UserError` as the class says."""
    _check(job)
    manifest = scan(job)
    units = _plan(job, manifest)
    with _writing(job.out):
        _check_out(job)  # before anything is written there
    codec = load_codec(job.codec, job.device, job.num_codebooks)
    with _writing(job.out):
        (job.out / "units").mkdir(parents=True, exist_ok=True)
        with _locked(job.out):
            _begin(job, manifest, codec.spec)
            done = _work(job, manifest, codec, units)
            rejects = [*manifest.rejects, *(r for unit in done for r in unit.rejects)]
            _check_rejects(job, manifest, rejects, final=True)
            return _finish(job, manifest, codec.spec, units, done, rejects)


def split_of(name: str, validation_percent: float) -> str:
    """'train' or 'validation', by a file's path without suffix: adding tracks moves no other."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "validation" if 100 * draw < validation_percent else "train"


def cut(wav_CN: np.ndarray, hop: int, max_frames: int) -> list[np.ndarray]:
    """Pieces [C, <= max_frames * hop] of a track, of equal length but for the last.

    Cuts lie between token frames. Pieces as equal as possible leave no short one at the end.
    """
    frames = math.ceil(wav_CN.shape[1] / hop)
    length = math.ceil(frames / math.ceil(frames / max_frames)) * hop
    return [wav_CN[:, i : i + length] for i in range(0, wav_CN.shape[1], length)]


def _check(job: Job) -> None:
    limits = {
        "max_reject_ratio": (0, 1),
        "validation_percent": (0, 99),
        "min_seconds": (0.1, 120),
        "max_clipped": (0, 1),
        "decode_timeout": (1, 10**5),
        "max_record_seconds": (1, 120),
        "tracks_per_shard": (1, 10**6),
        "batch_size": (1, 10**4),
        "readers": (1, 64),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(job, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} must lie between {low} and {high}")


def _check_out(job: Job) -> None:
    """Raises `UserError` if --out holds what is not this command's."""
    if not job.out.exists() or (job.out / "job.json").exists():
        return
    others = [p.name for p in job.out.iterdir() if p.name[0] != "." and p.name != "units"]
    if others or job.out.resolve() == job.audio.resolve():
        what = sorted(others)[0] if others else "the audio"
        raise UserError(f"--out {job.out}: holds other files ({what}); name a new folder")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turns whatever the file system refuses into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--out {out}: cannot be written ({reason})") from None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the folder for this process; the lock ends with the process, however it ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another job is writing there") from None
        yield


def _begin(job: Job, manifest: Manifest, spec: CodecSpec) -> None:
    """Notes what the folder is begun with, or checks that it was begun with the same."""
    settings = (
        "validation_percent", "min_seconds", "max_clipped", "max_record_seconds",
        "tracks_per_shard",
    )  # fmt: skip
    # (a codec is its weights, not its path; batch_size, readers, a device's number only change the
    # speed, but its kind rounds in its own way)
    begun = {
        "audio": manifest.fingerprint,
        **{f"codec {k}": v for k, v in asdict(spec).items() if k != "source"},
        **{f"--{name.replace('_', '-')}": getattr(job, name) for name in settings},
        "--device": job.device.split(":")[0],
    }
    path = job.out / "job.json"
    if not path.exists():
        records.write_text(path, json.dumps(begun, indent=2) + "\n")
        return
    try:
        before = json.loads(path.read_text())
        changed = sorted(k for k in before.keys() | begun.keys() if before.get(k) != begun.get(k))
    except (ValueError, AttributeError):
        raise UserError(f"{path}: damaged; name a new --out") from None
    if "audio" in changed:
        raise UserError(
            f"--out {job.out}: the audio or captions changed since this folder was begun; "
            f"name a new --out"
        )
    if changed:
        raise UserError(
            f"--out {job.out}: begun with other settings ({', '.join(changed)}); "
            f"use the same or name a new --out"
        )


def _plan(job: Job, manifest: Manifest) -> list[_Unit]:
    """The shards to make; raises `UserError` if no track is left to train on."""
    units = []
    for split in records.SPLITS:
        # (parts of one file stay together: validation is of music that training has not heard)
        tracks = [
            track
            for track in manifest.tracks
            if split_of(os.path.splitext(track.path)[0], job.validation_percent) == split
        ]
        for index, start in enumerate(range(0, len(tracks), job.tracks_per_shard)):
            part = tracks[start : start + job.tracks_per_shard]
            units.append(_Unit(split=split, index=index, tracks=part))
    if units and all(unit.split == "validation" for unit in units):
        count = len(manifest.tracks)
        raise UserError(f"all {count} tracks would fall to validation: lower --validation-percent")
    return units


def _work(job: Job, manifest: Manifest, codec: Codec, units: Sequence[_Unit]) -> list[_Done]:
    """Makes every shard that is not there yet, with a progress bar.

    Raises `UserError` as soon as there are too many rejects, whatever may follow.
    """
    found = [_read_done(job.out, unit) for unit in units]
    finished = _finished(job.out, units, found)
    seconds = sum(done.seconds for done, ok in zip(found, finished) if ok)
    files = sum(len(unit.tracks) for unit, ok in zip(units, finished) if ok)
    rejects = list(manifest.rejects)  # captions alone can already decide
    rejects += [r for done, ok in zip(found, finished) if ok for r in done.rejects]
    _check_rejects(job, manifest, rejects, final=False)
    with (
        readers(job.readers, job.decode_timeout) as submit,
        tqdm(
            total=sum(len(unit.tracks) for unit in units),
            initial=files,
            desc="tokenizing",
            unit="file",
            smoothing=0.1,
        ) as bar,
    ):
        progress = _Progress(bar, seconds)
        for i, unit in enumerate(units):
            if not finished[i]:
                found[i] = _make_shard(job, codec, unit, progress, submit)
                rejects += found[i].rejects
                _check_rejects(job, manifest, rejects, final=False)
    return found


class _Progress:
    """Files, hours of audio and speed on a tqdm bar."""

    def __init__(self, bar: tqdm, seconds_before: float):
        self.bar = bar
        self.before = seconds_before
        self.seconds = 0.0
        self.began = time.monotonic()
        self._show()

    def add(self, files: int, seconds: float) -> None:
        self.seconds += seconds
        self._show()
        self.bar.update(files)

    def _show(self) -> None:
        speed = self.seconds / max(time.monotonic() - self.began, 1e-3)
        hours = (self.before + self.seconds) / 3600
        self.bar.set_postfix_str(f"{hours:.2f} h of audio, {speed:.0f}x real time", refresh=False)


def _read_done(out: Path, unit: _Unit) -> _Done | None:
    """What a unit left behind; None if it is not done, or its note is damaged."""
    try:
        values = json.loads(unit.done_path(out).read_text(encoding="utf-8"))
        return _Done(
            shard=records.Shard(path=unit.record_path(out), **values["shard"]),
            seconds=float(values["seconds"]),
            rejects=[Reject(**reject) for reject in values["rejects"]],
            clipped=int(values["clipped"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _finished(out: Path, units: Sequence[_Unit], found: Sequence[_Done | None]) -> list[bool]:
    """Which units need no work: they left no records, or their file is there and whole.

    The file may have its final name already, which is only given once every unit is done.
    """
    places = {}
    if all(found):
        for split in records.SPLITS:
            shards = [
                done.shard
                for unit, done in zip(units, found)
                if unit.split == split and done.shard.num_examples > 0
            ]
            for i, shard in enumerate(shards):
                places[shard.path] = records.final_path(out, split, i, len(shards))

    def whole(shard: records.Shard) -> bool:
        candidates = [shard.path, places.get(shard.path, shard.path)]
        return any(p.exists() and p.stat().st_size == shard.file_bytes for p in candidates)

    return [
        done is not None and (done.shard.num_examples == 0 or whole(done.shard)) for done in found
    ]


def _make_shard(
    job: Job, codec: Codec, unit: _Unit, progress: _Progress, submit: Callable[..., Future]
) -> _Done:
    rejects: list[Reject] = []
    seconds, clipped = 0.0, 0

    def tracks() -> Iterator[tuple[Track, np.ndarray]]:
        nonlocal clipped
        intake = Intake(
            sample_rate=codec.spec.sample_rate,
            channels=codec.spec.channels,
            min_seconds=job.min_seconds,
            max_clipped=job.max_clipped,
        )
        for track, future in _read_ahead(job, intake, unit.tracks, submit):
            try:
                wav_CN, facts = future.result()
            except RejectedError as error:
                rejects.append(Reject(path=track.path, reason=error.reason, detail=error.detail))
                progress.add(1, 0.0)
            else:
                clipped += facts.clipped > CLIPPED
                yield track, wav_CN

    def examples() -> Iterator[dict[str, Any]]:
        nonlocal seconds
        for example in _examples(job, codec, tracks(), progress):
            seconds += example["duration"]
            yield example

    path = unit.record_path(job.out)
    shard = records.write_shard(path, codec.spec.num_codebooks, examples())
    done = _Done(shard=shard, seconds=seconds, rejects=rejects, clipped=clipped)
    values = asdict(done)
    del values["shard"]["path"]
    records.write_text(unit.done_path(job.out), json.dumps(values) + "\n")
    return done


def _examples(
    job: Job, codec: Codec, tracks: Iterable[tuple[Track, np.ndarray]], progress: _Progress
) -> Iterator[dict[str, Any]]:
    """The records of these tracks with their audio [C, N], in order.

    Only neighbours of equal length are stacked, so that nothing is padded and a record's tokens
    are those of encoding it alone.
    """
    rate, hop = codec.spec.sample_rate, codec.hop
    max_frames = int(job.max_record_seconds * codec.spec.frame_rate)
    batch: list[tuple[dict[str, Any], np.ndarray]] = []

    def encode() -> Iterator[dict[str, Any]]:
        codes_BKT = codec.encode(np.stack([wav_CN for _, wav_CN in batch]))
        for (example, _), codes_KT in zip(batch, codes_BKT):
            yield {"codes": codes_KT, **example}
        batch.clear()

    for track, wav_CN in tracks:
        start = 0
        for piece_CN in cut(wav_CN, hop, max_frames):
            length = piece_CN.shape[1]
            if batch and (
                batch[0][1].shape[1] != length
                or len(batch) >= job.batch_size
                or (len(batch) + 1) * length > max_frames * hop
            ):
                yield from encode()
            example = {
                "caption": track.caption,
                "info": track.info,
                "track_id": track.track_id,
                "source_path": track.path,
                "start": track.start + start / rate,
                "duration": length / rate,
            }
            batch.append((example, piece_CN))
            start += length
        progress.add(1, start / rate)
    if batch:
        yield from encode()


def _read_ahead(
    job: Job, intake: Intake, tracks: Sequence[Track], submit: Callable[..., Future]
) -> Iterator[tuple[Track, "Future[tuple[np.ndarray, Facts]]"]]:
    """Each track with what becomes its audio, in order; a few are read in advance."""
    waiting: deque = deque()
    for track in tracks:
        waiting.append((track, submit(read_audio, track, intake)))
        if len(waiting) > job.readers:
            yield waiting.popleft()
    yield from waiting


def _check_rejects(job: Job, manifest: Manifest, rejects: Sequence[Reject], *, final: bool) -> None:
    """Writes rejects.jsonl and raises if there are too many, or nothing is left.

    Before the end (`final`) the list is only written if it is the reason to stop, and never over
    the whole list of a complete data set.
    """
    total = len(manifest.tracks) + len(manifest.rejects)
    path = job.out / "rejects.jsonl"
    too_many = len(rejects) == total or len(rejects) > job.max_reject_ratio * total
    if final or (too_many and not records.is_complete(job.out)):
        in_order = sorted(rejects, key=lambda reject: reject.path)
        records.write_text(path, "".join(json.dumps(asdict(r)) + "\n" for r in in_order))
    if too_many:
        when = "" if final else " so far"
        raise UserError(
            f"{len(rejects)} of {total} audio files rejected{when}, --max-reject-ratio is "
            f"{job.max_reject_ratio:g}: {_reasons(rejects)}; see {path}"
        )


def _reasons(rejects: Sequence[Reject]) -> str:
    counts = Counter(reject.reason for reject in rejects)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def _finish(
    job: Job,
    manifest: Manifest,
    spec: CodecSpec,
    units: Sequence[_Unit],
    done: Sequence[_Done],
    rejects: Sequence[Reject],
) -> str:
    shards = {
        split: [d.shard for unit, d in zip(units, done) if unit.split == split]
        for split in records.SPLITS
    }
    counts = {split: sum(s.num_examples for s in shards[split]) for split in records.SPLITS}
    if counts["train"] == 0:
        raise UserError(
            f"every track to train on was rejected, {counts['validation']} records of validation "
            f"are left: mend the audio, or lower --validation-percent and name a new --out"
        )
    seconds = sum(d.seconds for d in done)
    total = len(manifest.tracks) + len(manifest.rejects)
    clipped = sum(d.clipped for d in done)
    about = {
        "hours": seconds / 3600,
        "audio_files": total,
        "rejected": len(rejects),
        "clipped": clipped,
    }
    records.finalise(job.out, shards, spec, about)
    for stale in (job.out / "units").glob(".*.tmp"):
        stale.unlink()
    rejected = f"{len(rejects)} of {total} files rejected"
    if rejects:
        rejected += f" ({_reasons(rejects)}; see {job.out / 'rejects.jsonl'})"
    return (
        f"{sum(counts.values())} records ({counts['train']} train, {counts['validation']} "
        f"validation), {seconds / 3600:.3f} h of audio; {rejected}; {clipped} clipped; ignored "
        f"{describe_ignored(manifest.ignored)}\n"
        f'open it with tfds.builder_from_directory("{job.out}")'
    )


def main() -> None:
    with reported():
        print(run(cli.parse(Job, prog="python -m tokenization.job")))


if __name__ == "__main__":
    main()
