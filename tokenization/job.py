"""Tokenizes audio with its captions: python -m tokenization.job --audio SOURCE --out DIR.

The tracks of each split are cut into shards, in the order that their source has them. A shard is
one unit of work and a function of the manifest alone; the small .json file that is written when its
records are on disk marks it as done. Killed at any moment and run again, the job goes on with the
next shard and ends with the same bytes.

DIR may be gs://BUCKET/FOLDER, see tokenization/place.py. On Apache Beam: tokenization/beam.py.

    DIR/job.json        what this folder was begun with; another job there is refused
    DIR/manifest.jsonl  the tracks of the source, see tokenization/source/manifest.py
    DIR/units/          finished shards until the end, then their .json files only
    DIR/rejects.jsonl   one line a file left out: path, reason, detail
    DIR/mix_rejects.jsonl   with --mix-ratio: the same of mixed tracks
    DIR/tokens-*        the data set, see magnet_jax/records.py
"""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import queue
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from magnet_jax import cli
from magnet_jax.codec.encodec import check_device, interleaved_spec, load_codec, read_spec
from magnet_jax.config import EMBEDDED, CodecSpec
from magnet_jax.data import records
from magnet_jax.errors import (
    PassingError,
    UserError,
    end_with_parent,
    reported,
    stop_when_terminated,
)
from magnet_jax.io import bucket, machine
from magnet_jax.io.files import how_to_make_room
from magnet_jax.io.torch_env import import_torch
from tokenization import encode as encoding
from tokenization import mixing
from tokenization.intake.audio import (
    CLIPPED,
    Facts,
    Intake,
    Reject,
    RejectedError,
    Track,
    is_outage,
)
from tokenization.intake.decoder import Decoder, Unpacker, open_audio
from tokenization.mixing import Mix
from tokenization.place import Place, place_at
from tokenization.source import manifest as manifests
from tokenization.source.paths import Source
from tokenization.source.scan import Manifest, describe_ignored, scan

MIX_REJECTS = "mix_rejects.jsonl"
_WHAT_EMBEDDED_IS_FOR = (
    "--codec embedded, the default, is for trying out: 16 kHz, and tokens that the music_* configs "
    "refuse; they take those of --codec facebook/encodec_32khz"
)


@dataclass(frozen=True, kw_only=True)
class Job(Source):
    """Turns audio with captions into a data set of EnCodec tokens.

    Run the same command again to go on after an interruption.
    """

    out: str | Path
    """Folder of the data set, or gs://BUCKET/FOLDER."""
    codec: str = EMBEDDED
    """'embedded', folder or hub id of a transformers EncodecModel (facebook/encodec_32khz),
    encodec_24khz, encodec_48khz, or the path of one of those two's weights."""
    num_codebooks: int | None = None
    """Codebooks to keep, with --stereo of each side; by default those of the codec's largest
    bandwidth up to 6 kbit/s."""
    stereo: Literal["none", "interleave"] = "none"
    """interleave: a mono codec encodes left and right by themselves, and their codebooks alternate;
    mono files count as both sides. none: the codec's own channels."""
    max_reject_ratio: float = 0.1
    """End with an error if a larger share of the audio files is rejected."""
    validation_percent: float = 5.0
    """Share of the tracks, chosen by a hash of their files' names, that is kept for validation."""
    split_by_folder: bool = False
    """In place of that share: tracks below the source's folder train are to train on, those below
    valid for validation, and all others are left out."""
    min_seconds: float = 1.0
    """Reject shorter tracks."""
    max_track_seconds: float = 6 * 3600.0
    """Reject longer tracks, which are more likely damaged, or whole albums."""
    max_clipped: float = 1.0
    """Reject tracks of which a larger share is clipped, that is in runs at full scale."""
    max_record_seconds: float = 120.0
    """Cut longer tracks into records of equal length; at most 120."""
    mix_ratio: float = 0.0
    """Add so many mixes of two tracks, as a share of the tracks to train on, see docs/data.md."""
    mix_seed: int = 0
    """Of what is mixed, and how."""
    mix_snr: tuple[float, float] = (-5.0, 5.0)
    """Lowest and highest level of one track over the other, in dB."""
    tracks_per_shard: int = 128
    """Tracks in a record file: the work lost by a kill, at most."""
    batch_size: int = 4
    """Tracks encoded at once; for each there are two processes that decode and resample."""
    window_seconds: float = 10.0
    """Length of what is encoded at once of a track; memory goes with it, and with batch_size."""
    workers: int = 1
    """Processes that make shards, each with a codec of its own."""
    shard: str = "0/1"
    """I/N: make every N-th shard, from the I-th on, 0 <= I < N: for N machines that share --out.
    When all are done the same command without --shard completes the data set."""
    decode_timeout: float = 60.0
    """Reject a file that its decoder makes no progress with for so many seconds."""
    device: str = "cpu"
    """Torch device of the codec: cpu, cuda, cuda:1, ...; one kind for the whole folder. Of several
    workers, cuda gives each another GPU."""
    rescan: bool = False
    """Scan the source again, though DIR/manifest.jsonl says what it holds, and end with an error
    if it holds something else by now."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the codec's convolutions; bfloat16 is faster on GPUs, and changes some tokens."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The work of one shard."""

    split: str
    index: int
    tracks: Sequence[Track] | Sequence[Mix]

    @property
    def is_mixed(self) -> bool:
        return isinstance(self.tracks[0], Mix)

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


# Makes units, given with their numbers, in any order.
Making = Callable[[Job, dict[int, Unit], "Progress"], Iterator[tuple[int, Done]]]


def run(job: Job, making: Making | None = None) -> str:
    """Runs a job to its end and returns the summary; raises `UserError` as the class says.

    making: what makes the units; by default this process, or --workers.
    """
    _check(job)
    place = place_at(job.out)
    if job.codec == EMBEDDED and job.audio.exists():
        print(_WHAT_EMBEDDED_IS_FOR, file=sys.stderr, flush=True)
    with writing(place):
        _check_out(job, place)  # before anything is written there
        is_new = "job.json" not in place.names()
    # (before the source is scanned, which may take hours)
    spec = _spec(job, read_spec(job.codec, job.num_codebooks))
    if is_new and making is None and job.device != "cpu":
        check_device(job.codec, job.device)
    with _begun(job, place, spec) as (manifest, units), writing(place):
        done = _work(job, place, manifest, units, making or _making_here(job))
        if job.shard != "0/1":
            missing = _finished(place, units, read_done(place, units)).count(False)
            return (
                f"shard {job.shard}: done; {missing} of {len(units)} record files are still to "
                "be made\nwhen none is, the same command without --shard completes the data set"
            )
        rejects = [*manifest.rejects, *_rejects(units, done, mixed=False)]
        _check_rejects(job, place, manifest, rejects, final=True)
        return _finish(job, place, manifest, spec, units, done, rejects)


def _spec(job: Job, codec: CodecSpec) -> CodecSpec:
    """What the tokens mean, of a codec by itself."""
    return interleaved_spec(codec) if job.stereo == "interleave" else codec


def split_of(name: str, validation_percent: float) -> str:
    """'train' or 'validation', by a file's path without suffix: adding tracks moves no other."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "validation" if 100 * draw < validation_percent else "train"


def _split(job: Job, track: Track) -> str | None:
    """Where a track goes; None if it is left out."""
    if job.split_by_folder:
        return {"train": "train", "valid": "validation"}.get(track.path.split("/")[0])
    # (parts of one file stay together: validation is of music that training has not heard)
    return split_of(os.path.splitext(track.path)[0], job.validation_percent)


def cut(frames: int, max_frames: int) -> list[tuple[int, int]]:
    """Where records of a track begin and end: at most `max_frames` long, as equal as possible."""
    length = math.ceil(frames / math.ceil(frames / max_frames))
    return [(i, min(i + length, frames)) for i in range(0, frames, length)]


def _check(job: Job) -> None:
    limits = {
        "max_reject_ratio": (0, 1),
        "validation_percent": (0, 99),
        "min_seconds": (0.1, 120),
        "max_track_seconds": (1, 10**6),
        "max_clipped": (0, 1),
        "decode_timeout": (1, 10**5),
        "max_record_seconds": (1, 120),
        "tracks_per_shard": (1, 10**6),
        "batch_size": (1, 1024),
        "window_seconds": (1, 120),
        "mix_ratio": (0, 100),
        "mix_seed": (0, 2**31 - 1),
        "workers": (1, 1024),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(job, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
    low, high = job.mix_snr
    if not -60 <= low <= high <= 60:
        raise UserError(f"--mix-snr {low:g} {high:g}: give the lower first, both within -60 to 60")
    _shard_of(job)
    if bucket.is_url(job.audio):
        url = bucket.url_of(job.audio)
        raise UserError(
            f"--audio {url}: audio is not read from a bucket; copy it (`gcloud storage rsync -r "
            f"{url} DIR`) or mount it (gcsfuse)"
        )


def _shard_of(job: Job) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", job.shard)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard {job.shard}: give I/N with I below N, such as 0/8 to 7/8")
    return int(found[1]), int(found[2])


def _check_out(job: Job, place: Place) -> None:
    """Raises `UserError` if --out holds what is not this command's."""
    names = place.names()
    others = sorted(name for name in names if name[0] != "." and name != "units")
    if "job.json" in names:
        return
    if "units" in names and any(name.startswith("units/") for name in place.sizes()):
        raise UserError(
            f"--out {place}: has record files in units, but no job.json, which tells what they "
            "were made of; name a new folder"
        )
    is_audio = not bucket.is_url(job.out) and Path(job.out).resolve() == job.audio.resolve()
    if others or is_audio:
        what = others[0] if others else "the audio"
        raise UserError(f"--out {place}: holds other files ({what}); name a new folder")


@contextmanager
def writing(place: Place) -> Iterator[None]:
    """Turns whatever the file system refuses into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        kind = PassingError if is_outage(error) else UserError
        advice = how_to_make_room(error)
        raise kind(f"--out {place}: cannot be written ({reason}){advice}") from None


@contextmanager
def _begun(job: Job, place: Place, spec: CodecSpec) -> Iterator[tuple[Manifest, list[Unit]]]:
    """Holds --out for this command; yields the tracks and their shards.

    The source is scanned, and what it holds written down, unless that is there already. Where a
    file of this command's shards has changed it is scanned again, and `_begin` decides.
    """
    with ExitStack() as holds:
        with ExitStack() as turn:
            with writing(place):
                turn.enter_context(place.turn(job.shard))
                written = _written(job, place)
            manifest, units = _tracks_and_units(job, written)
            with writing(place):
                holds.enter_context(place.held(job.shard))
                _begin(job, place, manifest, spec)
                if written is None:
                    place.write(manifests.NAME, manifests.lines(job, manifest))
        yield manifest, units


def _written(job: Job, place: Place) -> manifests.Written | None:
    """What was written down of the job's source; None where that is to be done anew."""
    written = None if _is_to_begin(job, place) else read_manifest(place)
    return written if written and written.source == manifests.settings(job) else None


def read_manifest(place: Place) -> manifests.Written | None:
    """What was written down at a place; None where nothing is, or what is there is damaged."""
    found = place.lines(manifests.NAME)
    if found is None:
        return None
    with contextlib.closing(found):
        return manifests.read(found)


def _tracks_and_units(job: Job, written: manifests.Written | None) -> tuple[Manifest, list[Unit]]:
    """What was written down, unless it is to be scanned again or files have changed since."""
    if written is not None and not job.rescan:
        units = plan(job, written.manifest)
        if manifests.is_as_it_was(written, _to_be_read(job, units)):
            return written.manifest, units
    manifest = scan(job)
    return manifest, plan(job, manifest)


def _to_be_read(job: Job, units: Sequence[Unit]) -> Iterator[Track]:
    """The tracks of this command's shards, with those that are mixed."""
    index, count = _shard_of(job)
    for unit in units[index::count]:
        for track in unit.tracks:
            yield from track.parts if isinstance(track, Mix) else (track,)


def _begin(job: Job, place: Place, manifest: Manifest, spec: CodecSpec) -> None:
    """Notes what the folder is begun with, or checks that it was begun with the same."""
    settings = (
        "validation_percent", "min_seconds", "max_track_seconds", "max_clipped",
        "max_record_seconds", "tracks_per_shard", "precision",
    )  # fmt: skip
    # (a codec is its weights, not its path; workers and a device's number only change the speed,
    # but its kind rounds in its own way, and so do batches and windows)
    begun = {
        "audio": manifest.fingerprint,
        **{f"codec {k}": v for k, v in asdict(spec).items() if k not in ("source", "interleaved")},
        **{f"--{name.replace('_', '-')}": getattr(job, name) for name in settings},
        "--device": job.device.split(":")[0],
        "--batch-size": job.batch_size,
        "--window-seconds": job.window_seconds,
    }
    # (what older folders do not have is only noted where it is used)
    if job.split_by_folder:
        begun["--split-by-folder"] = True
    if job.stereo != "none":
        begun["--stereo"] = job.stereo
    if job.mix_ratio > 0:
        begun |= {
            "--mix-ratio": job.mix_ratio,
            "--mix-seed": job.mix_seed,
            "--mix-snr": list(job.mix_snr),
        }
    text = json.dumps(begun, indent=2) + "\n"
    if _is_to_begin(job, place):
        place.write("job.json", text)  # whatever it was begun with, nothing was made of it
    found = place.create("job.json", text)
    try:
        before = json.loads(found)
        changed = sorted(k for k in before.keys() | begun.keys() if before.get(k) != begun.get(k))
    except (ValueError, AttributeError):
        raise UserError(f"{place}/job.json: damaged; name a new --out") from None
    if "audio" in changed:
        raise UserError(
            f"--out {place}: the audio or captions changed since this folder was begun; "
            f"name a new --out"
        )
    if changed:
        raise UserError(
            f"--out {place}: begun with other settings ({', '.join(changed)}); "
            f"use the same or name a new --out"
        )


def _is_to_begin(job: Job, place: Place) -> bool:
    """Whether nothing was made in a folder that is this command's alone."""
    return job.shard == "0/1" and place.is_held_alone and not _has_records(place)


def _has_records(place: Place) -> bool:
    """Whether any shard is done, or was; what a kill left of one does not count."""
    return any(name.startswith(("units/", "tokens-")) for name in place.sizes() if "/." not in name)


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


def _rejects(units: Sequence[Unit], found: Sequence[Done | None], *, mixed: bool) -> list[Reject]:
    """What finished units left out: files, or mixes, which are counted by themselves."""
    return [
        reject
        for unit, done in zip(units, found, strict=True)
        if done and unit.is_mixed == mixed
        for reject in done.rejects
    ]


def _work(
    job: Job, place: Place, manifest: Manifest, units: Sequence[Unit], making: Making
) -> list[Done | None]:
    """Makes every shard that is this command's and not there yet, with a progress bar.

    Raises `UserError` as soon as there are too many rejects, whatever may follow.
    """
    found = read_done(place, units)
    finished = _finished(place, units, found)
    index, count = _shard_of(job)
    to_do = {i: units[i] for i, ok in enumerate(finished) if not ok and i % count == index}
    found = [done if ok else None for done, ok in zip(found, finished)]
    rejects = list(manifest.rejects)  # captions alone can already decide
    rejects += _rejects(units, found, mixed=False)
    _check_rejects(job, place, manifest, rejects, final=False)
    with tqdm(
        total=sum(len(unit.tracks) for unit in to_do.values())
        + sum(len(unit.tracks) for unit, ok in zip(units, finished) if ok),
        initial=sum(len(unit.tracks) for unit, ok in zip(units, finished) if ok),
        desc="tokenizing",
        unit="file",
        smoothing=0.1,
    ) as bar:
        progress = Progress(bar, sum(done.seconds for done in found if done), rejects)
        with contextlib.closing(making(job, to_do, progress)) as made:
            for i, done in made:
                found[i] = done
                rejects += _rejects([units[i]], [done], mixed=False)
                _check_rejects(job, place, manifest, rejects, final=False)
    return found


def _making_here(job: Job) -> Making:
    return _make_here if job.workers == 1 else _make_in_workers


def _make_here(
    job: Job, units: dict[int, Unit], progress: "Progress"
) -> Iterator[tuple[int, Done]]:
    if not units:
        return
    with Maker(job, job.device) as make:
        for i, unit in units.items():
            yield i, make(unit, progress.add)


def _make_in_workers(
    job: Job, units: dict[int, Unit], progress: "Progress"
) -> Iterator[tuple[int, Done]]:
    """The units in order, each made by whichever worker is free."""
    context = multiprocessing.get_context("spawn")
    events = context.SimpleQueue()
    numbers = context.SimpleQueue()
    for number in range(job.workers):
        numbers.put(number)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(job.workers, len(units)) or 1,
        mp_context=context,
        initializer=_start_worker,
        initargs=(job, os.getpid(), numbers, events),
    )
    try:
        waiting = deque((i, pool.submit(_make_in_worker, unit)) for i, unit in units.items())
        while waiting:
            i, made = waiting.popleft()
            while not made.done():
                wait([made], timeout=0.2)
                while not events.empty():
                    progress.add(*events.get())
            yield i, made.result()
        while not events.empty():
            progress.add(*events.get())
    except BrokenProcessPool:
        raise PassingError(
            "a worker ended by itself: out of memory? Fewer --workers take less, and the command "
            "goes on from here; so do a smaller --batch-size or --window-seconds, in a new --out"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # what they are at is lost, and made again
        pool.shutdown(wait=False, cancel_futures=True)


class Progress:
    """Files, hours of audio, speed and rejects on a tqdm bar."""

    def __init__(self, bar: tqdm, seconds_before: float, rejects: Sequence[Reject]):
        self.bar = bar
        self.rejects = rejects
        self.before = seconds_before
        self.seconds = 0.0
        self.began = time.monotonic()
        bar.set_postfix_str("loading the codec")

    def add(self, files: int, seconds: float) -> None:
        self.seconds += seconds
        self._show()
        self.bar.update(files)

    def _show(self) -> None:
        speed = self.seconds / max(time.monotonic() - self.began, 1e-3)
        hours = (self.before + self.seconds) / 3600
        text = f"{hours:.2f} h of audio, {speed:.0f}x real time"
        if self.rejects:
            text += f", rejected: {_reasons(self.rejects)}"
        self.bar.set_postfix_str(text, refresh=False)


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


def _finished(place: Place, units: Sequence[Unit], found: Sequence[Done | None]) -> list[bool]:
    """Which units need no work: they left no records, or their file is there and whole.

    The file may have its final name already, which is only given once every unit is done.
    """
    sizes = place.sizes()
    final = {}
    if all(found):
        names = records.final_names(_by_split(units, found))
        final = {shard.path: name for shard, name in names}

    def whole(shard: records.Shard) -> bool:
        names = [shard.path.as_posix(), final.get(shard.path)]
        return shard.num_examples == 0 or shard.file_bytes in map(sizes.get, names)

    return [done is not None and whole(done.shard) for done in found]


def _by_split(units: Sequence[Unit], done: Sequence[Done]) -> dict[str, list[records.Shard]]:
    return {
        split: [one.shard for unit, one in zip(units, done) if unit.split == split]
        for split in records.SPLITS
    }


class Maker:
    """Makes shards: a codec, and the processes that decode for it; to be used as a context."""

    def __init__(self, job: Job, device: str):
        self._job = job
        self._place = place_at(job.out)
        self._codec = load_codec(job.codec, device, job.num_codebooks)
        self._spec = _spec(job, self._codec.spec)
        count = encoding.num_open(job.batch_size)
        self._decoders = [Decoder(job.decode_timeout) for _ in range(count)]
        self._unpacker = Unpacker(job.decode_timeout)

    def __enter__(self) -> "Maker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._unpacker.close()
        for decoder in self._decoders:
            decoder.close()

    def __call__(self, unit: Unit, progress: Callable[[int, float], None]) -> Done:
        """Makes a unit, and notes that it is done; `progress` gets files and seconds of audio."""
        job, spec = self._job, self._spec
        rejects: list[Reject] = []
        facts: dict[str, Facts] = {}
        mixed: dict[str, tuple[float, float]] = {}
        kept: list[float] = []  # seconds of mixes

        def examples() -> Iterator[dict[str, Any]]:
            for track, codes_KT, samples in self._encoded(unit.tracks, facts, mixed, rejects):
                if isinstance(track, Mix):
                    both = mixed[track.track_id]
                    whole = mixing.as_track(track, both[0])
                    for example in _examples(job, spec, whole, codes_KT, samples):
                        start, seconds = example["start"], example["duration"]
                        if mixing.is_heard(both, (start, start + seconds)):
                            kept.append(seconds)
                            yield example
                else:
                    yield from _examples(job, spec, track, codes_KT, samples)
                progress(1, samples / spec.sample_rate)

        shard = self._place.write_shard(unit.records_name, spec.num_codebooks, examples())
        shard = replace(shard, path=Path(unit.records_name))
        progress(len(rejects), 0.0)
        # (in their order: threads note them as they come)
        known = [facts[track.track_id] for track in unit.tracks if track.track_id in facts]
        seconds = sum(one.seconds for one in known) + sum(kept)
        clipped = sum(one.clipped > CLIPPED for one in known)
        done = Done(shard=shard, seconds=seconds, rejects=rejects, clipped=clipped)
        values = asdict(done)
        del values["shard"]["path"]
        self._place.write(unit.note_name, json.dumps(values) + "\n")
        return done

    def _encoded(
        self,
        tracks: Sequence[Track] | Sequence[Mix],
        facts: dict[str, Facts],
        mixed: dict[str, tuple[float, float]],
        rejects: list[Reject],
    ) -> Iterator[tuple[Track | Mix, np.ndarray, int]]:
        """The tracks that are fit, in order, with their tokens [K, T] and samples.

        Of each of them it notes the facts, or, of a mix, the seconds where both parts sound.
        """
        job, codec, spec = self._job, self._codec, self._spec
        intake = Intake(
            sample_rate=spec.sample_rate,
            channels=spec.channels,
            min_seconds=job.min_seconds,
            max_track_seconds=job.max_track_seconds,
            max_clipped=job.max_clipped,
        )
        idle: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        for decoder in self._decoders:
            idle.put(decoder)

        def blocks(track: Track | Mix, unpacked: Future | None) -> Iterator[np.ndarray]:
            whole = unpacked and unpacked.result()
            decoder = idle.get()
            try:
                if isinstance(track, Mix):
                    made = mixing.read(track, intake, decoder)
                    rate = intake.sample_rate
                    mixed[track.track_id] = (made.begin / rate, made.end / rate)
                    yield from mixing.blocks(made)
                else:
                    stream = open_audio(whole, intake, decoder)
                    yield from stream
                    facts[track.track_id] = stream.facts
            finally:
                idle.put(decoder)

        # (begun in the order of the tracks, which is that of their rows)
        sources = (
            encoding.Source(track, blocks(track, self._unpacker.submit(track)))
            if isinstance(track, Track)
            else encoding.Source(track, blocks(track, None))
            for track in tracks
        )
        if codec.config.norms_over_clip:
            pieces = functools.partial(cut, max_frames=_record_frames(job, spec))
            encoded = encoding.encode_pieces(
                codec, sources, pieces, rejected=RejectedError, sides=spec.sides
            )
        else:
            encoded = encoding.encode(
                codec,
                sources,
                window_frames=math.ceil(job.window_seconds * spec.frame_rate),
                batch_size=job.batch_size,
                rejected=RejectedError,
                precision=job.precision,
                sides=spec.sides,
            )
        for one in encoded:
            if one.error:
                reason, detail = one.error.reason, one.error.detail
                rejects.append(Reject(path=one.key.path, reason=reason, detail=detail))
            else:
                yield one.key, one.codes_KT, one.samples


def _record_frames(job: Job, spec: CodecSpec) -> int:
    return int(job.max_record_seconds * spec.frame_rate)


def _examples(
    job: Job, spec: CodecSpec, track: Track, codes_KT: np.ndarray, samples: int
) -> Iterator[dict[str, Any]]:
    """The records of a track."""
    hop = round(spec.sample_rate / spec.frame_rate)
    for first, end in cut(codes_KT.shape[1], _record_frames(job, spec)):
        yield {
            "codes": codes_KT[:, first:end],
            "caption": track.caption,
            "info": track.info,
            "track_id": track.track_id,
            "source_path": track.path,
            "start": track.start + first * hop / spec.sample_rate,
            "duration": (min(end * hop, samples) - first * hop) / spec.sample_rate,
        }


# --- workers ------------------------------------------------------------------------------------

_worker: Callable[[Unit], Done] | None = None  # of this process


def _start_worker(job: Job, parent: int, numbers: Any, events: Any) -> None:
    global _worker
    end_with_parent(parent)
    machine.keep_freed()
    torch = import_torch()
    torch.set_num_threads(max(1, machine.num_cpus() // job.workers))

    @functools.cache
    def maker() -> Maker:  # (made with the first unit: what is raised here says nothing)
        device = job.device
        if device == "cuda":
            device = f"cuda:{numbers.get() % max(torch.cuda.device_count(), 1)}"
        return Maker(job, device)

    def work(unit: Unit) -> Done:
        return maker()(unit, lambda files, seconds: events.put((files, seconds)))

    _worker = work


def _make_in_worker(unit: Unit) -> Done:
    return _worker(unit)


# --- the end ------------------------------------------------------------------------------------


def _check_rejects(
    job: Job, place: Place, manifest: Manifest, rejects: Sequence[Reject], *, final: bool
) -> None:
    """Writes rejects.jsonl and raises if there are too many, or nothing is left.

    Before the end (`final`) the list is only written if it is the reason to stop, and never over
    the whole list of a complete data set.
    """
    total = len(manifest.tracks) + len(manifest.rejects)
    too_many = len(rejects) == total or len(rejects) > job.max_reject_ratio * total
    if final or (too_many and not place.is_complete()):
        _write_rejects(place, "rejects.jsonl", rejects)
    if too_many:
        when = "" if final else " so far"
        # (a shard that is done was made of the audio as it was)
        then = "run the same command again" if _is_to_begin(job, place) else "name a new --out"
        raise UserError(
            f"{len(rejects)} of {total} audio files rejected{when}, --max-reject-ratio is "
            f"{job.max_reject_ratio:g}: {_reasons(rejects)}; see {place}/rejects.jsonl, mend them "
            f"and {then}, or raise the ratio"
        )


def _write_rejects(place: Place, name: str, rejects: Sequence[Reject]) -> None:
    in_order = sorted(rejects, key=lambda reject: reject.path)
    place.write(name, "".join(json.dumps(asdict(reject)) + "\n" for reject in in_order))


def _reasons(rejects: Sequence[Reject]) -> str:
    counts = Counter(reject.reason for reject in rejects)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def _finish(
    job: Job,
    place: Place,
    manifest: Manifest,
    spec: CodecSpec,
    units: Sequence[Unit],
    done: Sequence[Done],
    rejects: Sequence[Reject],
) -> str:
    shards = _by_split(units, done)
    counts = {split: sum(s.num_examples for s in shards[split]) for split in records.SPLITS}
    if counts["train"] == 0:
        raise UserError(
            f"every track to train on was rejected, {counts['validation']} records of validation "
            f"are left: mend the audio, or lower --validation-percent and name a new --out"
        )
    seconds = sum(d.seconds for unit, d in zip(units, done) if not unit.is_mixed)
    total = len(manifest.tracks) + len(manifest.rejects)
    clipped = sum(d.clipped for d in done)
    about = {
        "hours": seconds / 3600,
        "audio_files": total,
        "rejected": len(rejects),
        "clipped": clipped,
    }
    mixed = ""
    if job.mix_ratio > 0:
        drawn = sum(len(unit.tracks) for unit in units if unit.is_mixed)
        left_out = _rejects(units, done, mixed=True)
        hours = sum(d.seconds for unit, d in zip(units, done) if unit.is_mixed) / 3600
        about |= {"mixes": drawn - len(left_out), "mix_hours": hours}
        mixed = f"; {drawn - len(left_out)} mixes, {hours:.3f} h"
        if left_out:
            mixed += f", and {len(left_out)} left out ({_reasons(left_out)}; see {MIX_REJECTS})"
        _write_rejects(place, MIX_REJECTS, left_out)
    place.finalise(shards, spec, about)
    rejected = f"{len(rejects)} of {total} files rejected"
    if rejects:
        rejected += f" ({_reasons(rejects)}; see {place}/rejects.jsonl)"
    return (
        f"{sum(counts.values())} records ({counts['train']} train, {counts['validation']} "
        f"validation), {seconds / 3600:.3f} h of audio{mixed}; {rejected}; {clipped} clipped; "
        f"ignored {describe_ignored(manifest.ignored)}\n"
        f"{place.how_to_open()}"
    )


def main() -> None:
    stop_when_terminated()
    machine.keep_freed()
    machine.keep_to_quota()
    with reported():
        print(run(cli.parse(Job, prog="python -m tokenization.job")))


if __name__ == "__main__":
    main()
