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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from magnet_jax import cli
from magnet_jax.errors import UserError, reported
from magnet_jax.io import machine
from magnet_jax.io.torch_env import import_torch
from tokenization import job as jobs
from tokenization.job import Done, Job, Maker, Progress, Unit
from tokenization.place import place_at
from tokenization.source.manifest import NAME

logging.disable(logging.WARNING)  # of packages for Google's cloud that are not there
try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, WorkerOptions
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
    from apache_beam.runners.portability.portable_runner import JobServiceHandle
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
    """Beam's name of what runs it. DirectRunner is this machine, with --workers processes."""


def run(job: BeamJob, options: Sequence[str] = ()) -> str:
    """Runs a job to its end and returns the summary; raises `UserError` as `Job` says.

    options: Beam's, as on its command line.
    """
    if job.shard != "0/1":
        raise UserError("--shard: not on Beam, which hands out the shards by itself")
    if job.workers > 1 and job.runner != "DirectRunner":
        raise UserError(f"--workers: is of DirectRunner; {job.runner} has options of its own")
    options = list(options)
    if job.workers > 1:
        options += ["--direct_running_mode=multi_processing"]
        options += [f"--direct_num_workers={job.workers}"]
    flags = PipelineOptions(options)

    def making(_: Job, units: dict[int, Unit], progress: Progress) -> Iterator[tuple[int, Done]]:
        return _make(job, flags, units, progress)

    return jobs.run(job, making)


def _make(
    job: BeamJob, options: PipelineOptions, units: dict[int, Unit], progress: Progress
) -> Iterator[tuple[int, Done]]:
    """Units as they are done, while the pipeline runs."""
    if not units:
        return
    place = place_at(job.out)
    waiting = dict(units)
    with _running(job, options, list(units)) as wait:
        going = True
        while going:
            going = wait(place.poll_seconds)
            there = place.sizes()
            noted = {i: unit for i, unit in waiting.items() if unit.note_name in there}
            for i, done in zip(noted, jobs.read_done(place, list(noted.values()))):
                if _is_whole(done, there):
                    unit = waiting.pop(i)
                    progress.add(len(unit.tracks), done.seconds)
                    yield i, done
    if waiting:
        raise UserError(
            f"{job.runner} ended with {len(waiting)} of {len(units)} record files not made; the "
            "same command goes on from here"
        )


def _is_whole(done: Done | None, there: dict[str, int]) -> bool:
    """Whether a unit is noted, and its record file there as noted."""
    if done is None:
        return False
    shard = done.shard
    return shard.num_examples == 0 or there.get(shard.path.as_posix()) == shard.file_bytes


@contextlib.contextmanager
def _running(
    job: BeamJob, options: PipelineOptions, numbers: Sequence[int]
) -> Iterator[Callable[[float], bool]]:
    """Runs the pipeline in a thread, which this one may leave behind.

    Yields a function that waits so many seconds for the end, and says whether it is still to come;
    it raises `UserError` for what a worker raised as such.
    """
    local = job.runner == "DirectRunner"
    runner = _direct_runner(options) if local else job.runner
    try:
        pipeline = beam.Pipeline(runner=runner, options=options)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--runner {job.runner}: {error}") from None
    shards = pipeline | "units" >> beam.Create(numbers)
    shards |= "spread" >> beam.Reshuffle()
    shards |= "make" >> beam.ParDo(MakeShard(job, os.getpid() if local else None))
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

    def hear(args: Any) -> None:
        # DirectRunner waits for ever for the answer of a process that is no more.
        if "Worker subprocess exited" in str(args.exc_value):
            failures.append(
                UserError(
                    "a worker ended by itself: out of memory? Fewer --workers, a smaller "
                    "--batch-size or --window-seconds take less; the same command goes on from here"
                )
            )

    thread = threading.Thread(target=run_, daemon=True)
    hook, threading.excepthook = threading.excepthook, hear
    try:
        thread.start()
        yield wait
    finally:
        threading.excepthook = hook
        if thread.is_alive():
            for result in results:
                with contextlib.suppress(Exception):  # not every runner can
                    result.cancel()


def _direct_runner(options: PipelineOptions) -> FnApiRunner:
    """Beam's runner on this machine.

    By the name DirectRunner Beam would first look for another one in the network.
    """
    # What is logged as an error is raised as well. (The processes of this runner would take their
    # level from options that it does not hand on by itself.)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    options.view_as(WorkerOptions).default_sdk_harness_log_level = "CRITICAL"
    known = options.get_all_options()
    unknown = options.get_all_options(retain_unknown_options=True).keys() - known.keys()
    if unknown:
        raise UserError(f"--{min(unknown)}: not an option of Beam's DirectRunner")
    encoded = JobServiceHandle.encode_pipeline_options(known)
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return FnApiRunner(provision_info=ExtendedProvisionInfo(info))


def _explained(error: BaseException) -> BaseException:
    """The `UserError` that a worker raised, of what the runner made of it."""
    if isinstance(error, UserError) and "[while running" not in str(error):
        return error
    told = re.findall(r"UserError: (.*?)(?: \[while running|\n|$)", f"UserError: {error}")
    told = told if isinstance(error, UserError) else told[1:]
    return UserError(told[-1]) if told else error


# --- workers ------------------------------------------------------------------------------------


class MakeShard(beam.DoFn):
    """Makes the shards of units, given by their numbers; those that are done are left alone.

    launcher: the process that a worker of the same machine ends with.
    """

    # A runner may call several of these at once in one process, which shares one codec.
    _lock = threading.Lock()
    _maker: Maker | None = None
    _units: Sequence[Unit] = ()
    _users = 0
    _silenced = contextlib.ExitStack()

    def __init__(self, job: BeamJob, launcher: int | None):
        self._job = job
        self._launcher = launcher

    def setup(self) -> None:
        job, shared = self._job, MakeShard
        with shared._lock:
            shared._users += 1
            if shared._maker is None:
                if self._launcher not in (None, os.getpid()):
                    threading.Thread(target=_end_with, args=(self._launcher,), daemon=True).start()
                    # (what goes wrong in here the launcher says, and in one line)
                    shared._silenced.enter_context(_stderr_silenced())
                    threads = max(1, machine.num_cpus() // job.workers)
                    import_torch().set_num_threads(threads)
                written = jobs.read_manifest(place_at(job.out))
                if written is None:
                    raise UserError(f"--out {job.out}: no whole {NAME} there, as seen by a worker")
                shared._units = jobs.plan(job, written.manifest)
                shared._maker = Maker(job, job.device)

    def teardown(self) -> None:
        shared = MakeShard
        with shared._lock:
            shared._users -= 1
            if shared._users == 0:
                shared._maker.close()
                shared._maker = None
                shared._silenced.close()

    def process(self, element: int) -> None:
        unit, place = MakeShard._units[element], place_at(self._job.out)
        with MakeShard._lock, jobs.writing(place):
            (done,) = jobs.read_done(place, [unit])
            if not _is_whole(done, place.sizes()):  # a bundle that failed is given out again
                MakeShard._maker(unit, lambda files, seconds: None)


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Sends what this process and its libraries write to stderr nowhere, until the end."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _end_with(launcher: int) -> None:
    """Ends this process with the one that began the pipeline: --out is another's then."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(launcher, 0)  # asks whether it is there
            time.sleep(0.2)
    os._exit(1)


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
