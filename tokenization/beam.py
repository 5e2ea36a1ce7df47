"""Runs the tokenization job on Apache Beam: python -m tokenization.beam --audio SOURCE --out DIR.

    python -m tokenization.beam --audio SOURCE --out DIR --runner FlinkRunner -- --flink_master ...

The units, settings, files and messages are those of tokenization.job, and so are the bytes. Words
after -- are Beam's. What the pipeline hands on is the numbers of units alone: workers find their
tracks in --out, a folder that all of them see or gs://BUCKET/FOLDER, and write their shards there.
They read the audio, which all must see under the same path. The process that began the pipeline
sees what is done by the units' notes.
"""

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from magnet_jax import cli
from magnet_jax.errors import UserError, reported
from tokenization import job as jobs
from tokenization.maker import Maker
from tokenization.place import place_at
from tokenization.settings import Job
from tokenization.source.manifest import NAME
from tokenization.units import Done, Unit, is_whole, plan, read_done
from tokenization.workers import Progress

logging.disable(logging.WARNING)  # of packages for Google's cloud that are not there
try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
except ImportError as error:
    raise SystemExit(
        f"error: tokenization.beam needs further packages ({error.name}): "
        "pip install --no-deps -r requirements-beam.txt"
    ) from None
finally:
    logging.disable(logging.NOTSET)


@dataclass(frozen=True, kw_only=True)
class BeamJob(Job):
    """Turns audio with captions into a data set of EnCodec tokens, on Apache Beam.

    Run the same command again to go on after an interruption. Words after -- are Beam's options.
    """

    runner: str = "DirectRunner"
    """Beam's name of what runs it. DirectRunner is this process, to try a pipeline out."""


def run(job: BeamJob, options: Sequence[str] = ()) -> str:
    """Runs a job to its end and returns the summary; raises `UserError` as `Job` says.

    options: Beam's, as on its command line.
    """
    if job.shard != "0/1":
        raise UserError("--shard: not on Beam, which hands out the shards by itself")
    if job.workers > 1:
        raise UserError("--workers: of tokenization.job; Beam's runners have options of their own")
    pipeline = _pipeline(job, PipelineOptions(list(options)))

    def making(_: Job, units: dict[int, Unit], progress: Progress) -> Iterator[tuple[int, Done]]:
        return _make(job, pipeline, units, progress)

    return jobs.run(job, making)


def _pipeline(job: BeamJob, options: PipelineOptions) -> beam.Pipeline:
    """An empty pipeline, of the runner that is asked for."""
    runner: Any = job.runner
    if runner == "DirectRunner":
        known = options.get_all_options()
        given = options.get_all_options(retain_unknown_options=True)
        if unknown := given.keys() - known.keys():
            raise UserError(f"--{min(unknown)}: not an option of Beam's DirectRunner")
        # What it logs as an error is raised as well. By its name Beam would look for another one.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
        runner = FnApiRunner()
    try:
        return beam.Pipeline(runner=runner, options=options)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--runner {job.runner}: {error}") from None


def _make(
    job: BeamJob, pipeline: beam.Pipeline, units: dict[int, Unit], progress: Progress
) -> Iterator[tuple[int, Done]]:
    """Units as they are done, while the pipeline runs."""
    if not units:
        return
    shards = pipeline | "units" >> beam.Create(list(units))
    shards |= "spread" >> beam.Reshuffle()
    shards |= "make" >> beam.ParDo(MakeShard(job))
    place, waiting = place_at(job.out), dict(units)
    with _running(job, pipeline) as wait:
        going = True
        while going:
            going = wait(place.poll_seconds)
            there = place.sizes()
            noted = {i: unit for i, unit in waiting.items() if unit.note_name in there}
            for i, done in zip(noted, read_done(place, list(noted.values()))):
                if done and is_whole(done.shard, there):
                    unit = waiting.pop(i)
                    progress.add(len(unit.tracks), done.seconds)
                    yield i, done
    if waiting:
        raise UserError(
            f"{job.runner} ended with {len(waiting)} of {len(units)} record files not made; the "
            "same command goes on from here"
        )


@contextlib.contextmanager
def _running(job: BeamJob, pipeline: beam.Pipeline) -> Iterator[Callable[[float], bool]]:
    """Runs the pipeline in a thread, which this one may leave behind.

    Yields a function that waits so many seconds for the end, and says whether it is still to come;
    it raises `UserError` for what a worker raised as such.
    """
    results: list[Any] = []
    failures: list[BaseException] = []

    def run_() -> None:
        try:
            results.append(pipeline.run())
            state = results[0].wait_until_finish()
            if state not in (None, "DONE"):
                raise UserError(f"{job.runner} ended as {state}; see its own logs")
        except BaseException as error:
            failures.append(error)

    def wait(seconds: float) -> bool:
        thread.join(seconds)
        if failures:
            raise _explained(failures[0])
        return thread.is_alive()

    thread = threading.Thread(target=run_, daemon=True)
    thread.start()
    try:
        yield wait
    finally:
        if thread.is_alive():
            for result in results:
                with contextlib.suppress(Exception):  # not every runner can
                    result.cancel()


def _explained(error: BaseException) -> BaseException:
    """The `UserError` that a worker raised, of what the runner made of it."""
    if isinstance(error, UserError) and "[while running" not in str(error):
        return error
    told = re.findall(r"UserError: (.*?)(?: \[while running|\n|$)", f"UserError: {error}")
    told = told if isinstance(error, UserError) else told[1:]
    return UserError(told[-1]) if told else error


class MakeShard(beam.DoFn):
    """Makes the shards of units, given by their numbers; those that are done are left alone."""

    # A runner may call several of these at once in one process, which shares one codec.
    _lock = threading.Lock()
    _maker: Maker | None = None
    _units: Sequence[Unit] = ()
    _users = 0

    def __init__(self, job: BeamJob):
        self._job = job

    def setup(self) -> None:
        job, shared = self._job, MakeShard
        with shared._lock:
            shared._users += 1
            if shared._maker is None:
                written = jobs.read_manifest(place_at(job.out))
                if written is None:
                    raise UserError(f"--out {job.out}: no whole {NAME} there, as seen by a worker")
                shared._units = plan(job, written.manifest)
                shared._maker = Maker(job, job.device)

    def teardown(self) -> None:
        shared = MakeShard
        with shared._lock:
            shared._users -= 1
            if shared._users == 0 and shared._maker is not None:
                shared._maker.close()
                shared._maker = None

    def process(self, element: int) -> None:
        unit, place = MakeShard._units[element], place_at(self._job.out)
        with MakeShard._lock, jobs.writing(place):
            (done,) = read_done(place, [unit])
            if not (done and is_whole(done.shard, place.sizes())):  # a bundle may come again
                MakeShard._maker(unit, lambda files, seconds: None)


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    try:
        with reported():
            job = cli.parse(BeamJob, words[:cut], prog="python -m tokenization.beam")
            print(run(job, words[cut + 1 :]))
    except SystemExit as end:
        # Threads of a runner may still be at work, and Python would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    # Workers know what is here by the module's own name.
    from tokenization import beam as module

    module.main()
