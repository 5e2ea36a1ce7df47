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
    DIR/tokens-*        the data set, see magnet_jax/data/records.py
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from magnet_jax import cli
from magnet_jax.codec.encodec import check_device, read_spec
from magnet_jax.config import EMBEDDED, CodecSpec
from magnet_jax.data import records
from magnet_jax.errors import PassingError, UserError, reported, stop_when_terminated
from magnet_jax.io import bucket, ledger, machine
from magnet_jax.io.files import how_to_make_room
from magnet_jax.io.formats import is_outage
from tokenization.place import Place, place_at
from tokenization.settings import Job, begun_with, check, shard_of, spec_of
from tokenization.source import manifest as manifests
from tokenization.source.manifest import Manifest
from tokenization.source.scan import describe_ignored, scan
from tokenization.track import Reject
from tokenization.units import Done, Unit, by_split, finished, plan, read_done, rejects_of
from tokenization.workers import Making, Progress, make_here, make_in_workers, reasons

MIX_REJECTS = "mix_rejects.jsonl"
_WHAT_EMBEDDED_IS_FOR = (
    "--codec embedded, the default, is for trying out: 16 kHz, and tokens that the music_* configs "
    "refuse; they take those of --codec facebook/encodec_32khz"
)


def run(job: Job, making: Making | None = None) -> str:
    """Runs a job to its end and returns the summary; raises `UserError` as the class says.

    making: what makes the units; by default this process, or --workers.
    """
    check(job)
    place = place_at(job.out)
    if job.codec == EMBEDDED and job.audio.exists():
        print(_WHAT_EMBEDDED_IS_FOR, file=sys.stderr, flush=True)
    with writing(place):
        _check_out(job, place)  # before anything is written there
        is_new = "job.json" not in place.names()
    # Before the source is scanned, which may take hours.
    spec = spec_of(job, read_spec(job.codec, job.num_codebooks))
    if is_new and making is None and job.device != "cpu":
        check_device(job.codec, job.device)
    with _begun(job, place, spec) as (manifest, units), writing(place):
        making = making or (make_here if job.workers == 1 else make_in_workers)
        done = _work(job, place, manifest, units, making)
        if job.shard != "0/1":
            missing = finished(place, units, read_done(place, units)).count(False)
            return (
                f"shard {job.shard}: done; {missing} of {len(units)} record files are still to "
                "be made\nwhen none is, the same command without --shard completes the data set"
            )
        rejects = [*manifest.rejects, *rejects_of(units, done)]
        _check_rejects(job, place, manifest, rejects, final=True)
        return _finish(job, place, manifest, spec, units, done, rejects)


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
    with contextlib.closing(found) if found else contextlib.nullcontext(()):
        return manifests.read(found or ())


def _tracks_and_units(job: Job, written: manifests.Written | None) -> tuple[Manifest, list[Unit]]:
    """What was written down, unless it is to be scanned again or files have changed since."""
    if written is not None and not job.rescan:
        units = plan(job, written.manifest)
        if manifests.is_as_it_was(written, _to_be_read(job, units)):
            return written.manifest, units
    manifest = scan(job)
    return manifest, plan(job, manifest)


def _to_be_read(job: Job, units: Sequence[Unit]) -> set[str]:
    """The files of this command's shards."""
    index, count = shard_of(job)
    tracks = (track for unit in units[index::count] for track in unit.tracks)
    return {path for track in tracks for path in track.part.paths}


def _begin(job: Job, place: Place, manifest: Manifest, spec: CodecSpec) -> None:
    """Notes what the folder is begun with, or checks that it was begun with the same."""
    settings = begun_with(job, manifest.fingerprint, spec)
    if _is_to_begin(job, place):  # whatever it was begun with, nothing was made of it
        place.write("job.json", ledger.note(settings))
    found = place.create("job.json", ledger.note(settings))
    ledger.check(found, settings, free=["audio"], where=f"--out {place}", name="job.json")
    if json.loads(found).get("audio") != manifest.fingerprint:
        raise UserError(
            f"--out {place}: the audio or captions changed since this folder was begun; name "
            "another --out"
        )


def _is_to_begin(job: Job, place: Place) -> bool:
    """Whether nothing was made in a folder that is this command's alone."""
    return job.shard == "0/1" and place.is_held_alone and not _has_records(place)


def _has_records(place: Place) -> bool:
    """Whether any shard is done, or was; what a kill left of one does not count."""
    return any(name.startswith(("units/", "tokens-")) for name in place.sizes() if "/." not in name)


def _work(
    job: Job, place: Place, manifest: Manifest, units: Sequence[Unit], making: Making
) -> list[Done | None]:
    """Makes every shard that is this command's and not there yet, with a progress bar.

    Raises `UserError` as soon as there are too many rejects, whatever may follow.
    """
    found = read_done(place, units)
    is_done = finished(place, units, found)
    index, count = shard_of(job)
    to_do = {i: units[i] for i, ok in enumerate(is_done) if not ok and i % count == index}
    found = [done if ok else None for done, ok in zip(found, is_done)]
    rejects = list(manifest.rejects)  # captions alone can already decide
    rejects += rejects_of(units, found)
    _check_rejects(job, place, manifest, rejects, final=False)
    before = sum(len(unit.tracks) for unit, ok in zip(units, is_done) if ok)
    total = before + sum(len(unit.tracks) for unit in to_do.values())
    with tqdm(total=total, initial=before, desc="tokenizing", unit="file", smoothing=0.1) as bar:
        progress = Progress(bar, sum(done.seconds for done in found if done), rejects)
        with contextlib.closing(making(job, to_do, progress)) as made:
            for i, done in made:
                found[i] = done
                rejects += rejects_of([units[i]], [done])
                _check_rejects(job, place, manifest, rejects, final=False)
    return found


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
        # A shard that is done was made of the audio as it was.
        then = "run the same command again" if _is_to_begin(job, place) else "name a new --out"
        raise UserError(
            f"{len(rejects)} of {total} audio files rejected{when}, --max-reject-ratio is "
            f"{job.max_reject_ratio:g}: {reasons(rejects)}; see {place}/rejects.jsonl"
            f"{'' if final else ' (tokenization.check names all that will be)'}, mend them and "
            f"{then}, or raise the ratio"
        )


def _write_rejects(place: Place, name: str, rejects: Sequence[Reject]) -> None:
    in_order = sorted(rejects, key=lambda reject: reject.path)
    place.write(name, "".join(json.dumps(asdict(reject)) + "\n" for reject in in_order))


def _finish(
    job: Job,
    place: Place,
    manifest: Manifest,
    spec: CodecSpec,
    units: Sequence[Unit],
    done: Sequence[Done],
    rejects: Sequence[Reject],
) -> str:
    shards = by_split(units, done)
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
        left_out = rejects_of(units, done, mixed=True)
        hours = sum(d.seconds for unit, d in zip(units, done) if unit.is_mixed) / 3600
        about |= {"mixes": drawn - len(left_out), "mix_hours": hours}
        mixed = f"; {drawn - len(left_out)} mixes, {hours:.3f} h"
        if left_out:
            mixed += f", and {len(left_out)} left out ({reasons(left_out)}; see {MIX_REJECTS})"
        _write_rejects(place, MIX_REJECTS, left_out)
    place.finalise(shards, spec, about)
    rejected = f"{len(rejects)} of {total} files rejected"
    if rejects:
        rejected += f" ({reasons(rejects)}; see {place}/rejects.jsonl)"
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
