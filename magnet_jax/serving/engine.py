"""Jobs, their queue, and the one thread that owns the device.

    engine = Engine(model, store, Limits(), name="demo")
    with engine:
        job = engine.submit(Generate(input="a calm harp", n=2))
        job.wait()
        path = engine.audio(job, 0)

Any thread may submit, cancel and look. One thread takes jobs and computes: clips of texts in
batches, clips of several jobs and settings together, as far as one program makes them; edits one
after another. Between two segments of a program (`decode.segments`) it looks whether anybody still
wants what it is making. Another thread writes files meanwhile.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from magnet_jax import programs
from magnet_jax.api import MAGNeT
from magnet_jax.codec import decoding
from magnet_jax.decode import long
from magnet_jax.decode.segments import Progress
from magnet_jax.errors import UserError
from magnet_jax.io import audio
from magnet_jax.looping import Loops
from magnet_jax.serving import admission, requests, store, work
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import ENDED, Job, from_record, new_id, new_job, record_of
from magnet_jax.serving.limits import Limits
from magnet_jax.serving.queue import Pace, Queue
from magnet_jax.serving.requests import Request
from magnet_jax.serving.work import Model, Row

log = logging.getLogger(__name__)

WAIT = {"cpu": 0.0}  # seconds for which a batch waits for more; a CPU gains nothing from batches
WAIT_ELSEWHERE = 0.02
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # stands in what XLA says then
LAST_SECONDS = 60.0  # at the end, for what the device is at: a compilation cannot be stopped
MOST_UNDONE = 300  # jobs of an owner that failed or were cancelled, and are still known
HOUSEKEEPING = 30.0  # seconds between two looks at what has expired


class LeftError(Exception):
    """Nobody wants any more what the device is making."""


class Engine:
    """A model, served; see the module.

    Args:
      name: what requests call the model.
      warm: seconds of clips and how many of them at once, the programs for which are made before
        `ready` is set. `warmed` is set then, or when that failed, with a `failure`.
    """

    def __init__(
        self,
        model: Model,
        files: store.Store,
        limits: Limits,
        *,
        name: str,
        warm: tuple[tuple[float, int], ...] = (),
    ):
        self._to_warm = warm
        self.warmed = threading.Event()
        self.failure: Exception | None = None
        self.name, self.limits, self.files = name, limits, files
        self.ready = False
        # Beside the device thread, whoever uses the model changes nothing.
        self.model = model
        model.execution = dataclasses.replace(model.execution, say=self._say)
        self._about = work.about_model(model, name)
        self._editor = work.Editor(model, files)
        self._wait = WAIT.get(jax.default_backend(), WAIT_ELSEWHERE)
        self._lock = threading.Condition(threading.RLock())
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._queue = Queue()
        self._pace = Pace(model.max_duration, model.frame_rate)
        self._running: list[Job] = []
        # Of longer clips that were begun: what makes more of them, and what there is.
        self._begun: dict[str, tuple[Iterator[long.Part], long.Part]] = {}
        self._heard = work.first_heard(model)
        self._share = 1.0  # of a job that is made alone: how much the device has just made
        self.draining = self._closed = False
        # Of idempotent requests: owner, client and key; the job, and what its request hashes to.
        self._keys: dict[tuple[str, str, str], tuple[str, bytes]] = {}
        self._reading = threading.Lock()  # around the tokenizer
        self._batches: collections.Counter = collections.Counter()
        self._ended: collections.Counter = collections.Counter()
        self._made = {"clips": 0, "audio_seconds": 0.0, "busy_seconds": 0.0}
        self.began = time.time()
        self._since = 0.0  # when the batch began, without the time that compiling took
        self._compiling = 0.0  # since when a program is compiled
        self._device = threading.Thread(target=self._work, name="device", daemon=True)
        self._keeper = threading.Thread(target=self._keep_house, name="keeper", daemon=True)
        self._writer = ThreadPoolExecutor(1, "writer")
        self._writing = 0

    # --- life -------------------------------------------------------------------------------------

    def __enter__(self) -> "Engine":
        self._device.start()
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _warm(self) -> None:
        """Makes clips of the lengths and in the batches that are to be warm: programs are there."""
        size = 0
        try:
            for seconds, size in self._to_warm:
                request = requests.Generate(input="a calm melody", seconds=seconds, seed=0)
                row = work.rows_of(new_job(request, "", ""), self.model)[0]
                work.generate(self.model, [row] * size, lambda progress: self._go_on_warming())
            self.ready = True
        except LeftError:
            pass
        except Exception as error:
            if size > 1 and OUT_OF_MEMORY in str(error):
                # What is longer than what was tried is made one clip at a time when it fails.
                self.limits = dataclasses.replace(self.limits, max_batch=size // 2)
                log.warning("%d clips at once do not fit into memory: %d do", size, size // 2)
                self.ready = True
            else:
                self.failure = error
        self.warmed.set()

    def _go_on_warming(self) -> None:
        if self._closed:
            raise LeftError

    @property
    def alive(self) -> bool:
        """Whether the device's thread is there."""
        return self._device.is_alive()

    def drain(self, seconds: float | None = None) -> bool:
        """Takes no more jobs, and waits until those that are there have ended; whether they did."""
        with self._lock:
            self.draining = True
            self._lock.notify_all()
            return self._lock.wait_for(
                lambda: not self._queue and not self._running and not self._writing, seconds
            )

    def close(self) -> None:
        """Cancels what is left, and ends the threads."""
        with self._lock:
            self.draining = self._closed = True
            for job in list(self._jobs.values()):
                self.cancel(job)
            self._lock.notify_all()
        if self._device.is_alive():
            self._device.join(LAST_SECONDS)
        self._writer.shutdown()

    # --- jobs -------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        *,
        client: str = "",
        owner: str = "",
        idempotency_key: str | None = None,
    ) -> Job:
        """Puts a request into the queue.

        Args:
          client: whose turn it takes, see `Queue.next`.
          owner: who may see the job.
          idempotency_key: the same one, of the same owner and client, gives the same job, unless
            that was cancelled, or failed through no fault of the request.

        Raises:
          UserError: a request that cannot be done, now or ever; `RequestError` says when.
        """
        content = hashlib.sha256(request.model_dump_json().encode()).digest()
        place = None if idempotency_key is None else (owner, client, idempotency_key)
        job = new_job(request, client, owner)
        with self._lock:
            if known := self._known(place, content):
                return known
            self._check_room(job)
        # Files are read and texts are tokenized while others go on.
        admission.check(job, self)
        with self._reading:
            rows = self._rows_of(job)
        with self._lock:
            if known := self._known(place, content):  # the same one came meanwhile
                return known
            self._check_room(job)
            self.files.hold(*self._sources(job))
            if rows[0].key[0] == "generate":  # others tell as they go
                job.total = sum(row.steps for row in rows)
            self._jobs[job.id] = job
            self._queue.add(job, rows)
            if place is not None:
                self._keys[place] = job.id, content
            self._lock.notify_all()
        return job

    def _check_room(self, job: Job) -> None:
        waiting = self._queue.jobs
        first = self._pace.seconds_of(waiting[0]) if waiting else None
        admission.check_room(job, waiting, self, first)

    def _known(self, place: tuple[str, str, str] | None, content: bytes) -> Job | None:
        """The job of an idempotency key; None where there is none, or one to be done again."""
        job_id, before = self._keys.get(place, ("", b"")) if place else ("", b"")
        job = self._jobs.get(job_id)
        if job is None or job.state == "cancelled" or (job.error and job.error.status >= 500):
            return None
        if before != content:
            raise RequestError(
                "this Idempotency-Key was given with another request", status=409,
                code="idempotency_conflict",
            )  # fmt: skip
        return job

    def _rows_of(self, job: Job) -> list[Row]:
        if job.kind == "generate":
            return work.rows_of(job, self.model)
        return [Row(job, 0, (job.id,), work.decoding_of(self.model, job.request), 0, "")]

    def _sources(self, job: Job) -> list[Path]:
        """The folders of what a job edits."""
        return [self._editor.path(*one).parent for one in admission.sources_of(job.request)]

    @property
    def edits(self) -> bool:
        """Whether the model edits as well."""
        return isinstance(self.model, MAGNeT)

    def job(self, job_id: str, owner: str = "") -> Job:
        """A job; `RequestError` 404 where there is none, or it is another's."""
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None:
            record = self.files.record(job_id)
            with self._lock:
                job = self._remembered(record)
        if job is None or job.owner != owner:
            raise RequestError(
                "no such job: it was never there, or has expired", status=404, code="not_found"
            )
        return job

    def _remembered(self, record: dict[str, Any] | None) -> Job | None:
        """A job that this process, before, or another one has done."""
        if record is None:
            return None
        try:
            job = from_record(record)
        except (LookupError, TypeError, ValueError):  # of another version
            return None
        return self._jobs.setdefault(job.id, job)

    def view(self, job: Job) -> dict[str, Any]:
        """What is told of a job, as JSON has it."""
        with self._lock:
            position, eta = None, None
            if job.state not in ENDED:
                position, eta = self._ahead(job)
            return job.view(position, eta)

    def cancel(self, job: Job) -> None:
        """Ends a job. The device leaves it at the end of the segment that it is at."""
        self._end(job, "cancelled")

    def audio_path(self, job: Job, index: int) -> Path:
        """The WAV of a clip, there or not."""
        return self.files.clip(job.id, index)

    # --- the queue --------------------------------------------------------------------------------

    def _next(self) -> list[Row]:
        """The rows of the next batch, of which there is one at least; [] where the engine ends.

        On accelerators it waits a little for more, where there is room.
        """
        with self._lock:
            batch: list[Row] = []
            most = self.limits.max_batch
            while not batch:
                # No more clips wait in memory to be written than of two batches.
                self._lock.wait_for(
                    lambda: (self._queue and self._writing < 2 * most) or self._closed
                )
                if self._closed:
                    return []
                batch = self._queue.next(most)
                if self._wait and len(batch) < most and batch[0].num_frames:
                    self._lock.wait_for(lambda: self._closed, self._wait)
                    batch = self._queue.next(most)
            self._queue.take(batch)
            self._running = list(dict.fromkeys(row.job for row in batch))
            self._start(self._running)
            return batch

    def _start(self, jobs: list[Job]) -> None:
        """Begins a batch of jobs, or goes on with them. Each is charged what all of it takes."""
        estimate, least = self._seconds_of(jobs), self.limits.job_seconds
        for job in jobs:
            # Where nothing like it was made yet, programs are compiled; and how long an edit takes
            # depends on more than its kind.
            known = estimate is not None and job.kind == "generate"
            budget = max(least if known else 10 * least, job.spent + 2 * (estimate or 0))
            job.budget = max(job.budget, budget)
            if job.state == "queued":
                job.state, job.started = "running", time.time()
                job.changed()

    def _seconds_of(self, jobs: list[Job]) -> float | None:
        """Seconds that what is left of jobs takes; None where that is not known of one."""
        seconds = [self._pace.seconds_of(job) for job in jobs]
        return None if None in seconds else sum(seconds)

    def _end(self, job: Job, state: str, error: RequestError | None = None) -> None:
        with self._lock:
            if job.state in ENDED:
                return
            self._queue.drop(job)
            self._begun.pop(job.id, None)
            self.files.release(*self._sources(job))
            job.state, job.error, job.ended, job.stage = state, error, time.time(), ""
            self._ended[state] += 1
            if state != "done":  # those that are done go with their files
                undone = [
                    other for other in self._jobs.values()
                    if other.owner == job.owner and other.state in ENDED and other.state != "done"
                ]  # fmt: skip
                for other in undone[:-MOST_UNDONE]:
                    del self._jobs[other.id]
            job.changed()
            self._lock.notify_all()

    def _ahead(self, job: Job) -> tuple[int, float | None]:
        """How many jobs come before one, and in how many seconds it will have ended."""
        waiting = self._queue.jobs
        before = waiting[: waiting.index(job)] if job in waiting else []
        first = [] if job in self._running else [j for j in self._running if j not in before]
        # A batch ends as a whole.
        eta = self._seconds_of(list(dict.fromkeys([*self._running, *before, job])))
        return len(first) + len(before), eta

    # --- the device thread ------------------------------------------------------------------------

    def _work(self) -> None:
        self._warm()
        while batch := self._next():
            started, compiled = time.monotonic(), programs.count()
            self._since, self._share = started, 1.0
            try:
                self._run(batch)
            finally:
                took = time.monotonic() - started
                with self._lock:
                    for job in self._running:
                        job.spent += time.monotonic() - self._since
                        if job.state in ENDED:  # while the device was at it
                            self._begun.pop(job.id, None)
                    self._made["busy_seconds"] += took
                    # Nothing was compiled meanwhile, and no job left before its work was done.
                    if programs.count() == compiled and not any(map(_left, self._running)):
                        self._pace.took(batch, self._share, took)
                    self._running = []
                    self._batches[len(batch)] += 1
                    self._lock.notify_all()

    def _run(self, batch: list[Row]) -> None:
        """Makes a batch; what cannot be made fails the jobs whose fault it is, and no others."""
        try:
            if batch[0].key[0] == "generate":
                self._generate(batch)
            elif batch[0].key[0] == work.LONG:
                self._go_on(batch[0])
            else:
                self._edit(batch[0].job)
        except LeftError:
            pass
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0].job, error)
                return
            log.warning("a batch of %d failed (%s); each alone once more", len(batch), error)
            for row in batch:
                if row.job.state not in ENDED:
                    self._since = time.monotonic()  # no row pays for those before it
                    self._run([row])

    def _generate(self, batch: list[Row]) -> None:
        jobs = list({row.job.id: row.job for row in batch}.values())
        before = {job.id: job.done for job in jobs}
        steps = getattr(work.decode_of(batch[0].decoding), "steps", ())
        heard = sum(steps[: self._heard])  # steps after which something can be heard
        last = 0

        def between(progress: Progress) -> None:
            nonlocal last
            for job in self._live(jobs):
                count = sum(row.job is job for row in batch)
                job.done = before[job.id] + count * progress.done
                job.stage = f"codebook {progress.codebook + 1}"
                job.changed()
            if last < heard <= progress.done < progress.total:
                self._previews(batch, progress)
            last = progress.done

        try:
            made = work.generate(self.model, batch, between)
        except Exception:
            for job in jobs:  # what is made once more is counted once
                job.done = before[job.id]
            raise
        sures = [self._sure(row, one) for row, one in zip(batch, made)]
        for row, one, sure in zip(batch, made, sures):  # nothing fails from here on
            if row.job.state not in ENDED:
                self._write(row.job, self._keep_row, row, one, sure)

    def _previews(self, batch: list[Row], progress: Progress) -> None:
        """Keeps what the first codebooks sound like, for those who want to hear it."""
        wanted = [i for i, row in enumerate(batch) if row.index == 0 and row.job.request.preview]
        for i in wanted:
            codes_KT = progress.codes_BKT[i, : self._heard]
            wav_CN = work.preview(self.model, codes_KT, batch[i].num_frames)
            self._write(batch[i].job, self._keep_preview, batch[i].job, wav_CN)

    def _go_on(self, row: Row) -> None:
        """Makes the next windows of longer clips; what is left of them waits for its next turn."""
        job = row.job
        begun = self._begun.get(job.id)
        if begun is None:
            parts = work.parts(self.model, row, lambda progress: self._tell(job, progress))
            begun = self._begun[job.id] = parts, next(parts)  # before any is made
        parts, part = begun
        self._share = 1 / part.total
        part = next(parts)
        self._begun[job.id] = parts, part
        with self._lock:
            if job.state in ENDED:
                return
            if part.done < part.total:
                self._queue.add(job, [row])
                return
        wav_BCN = decoding.decode_audio(self.model.decoder, part.codes_BKT)
        clips = [work.Made(*one) for one in zip(wav_BCN, part.codes_BKT)]
        sures = [self._sure(row, made) for made in clips]
        for index, (made, sure) in enumerate(zip(clips, sures)):
            self._write(job, self._keep_row, row._replace(index=index), made, sure)

    def _tell(self, job: Job, progress: Progress) -> None:
        """How far the windows are that the device is at."""
        self._live([job])
        begun = self._begun.get(job.id)
        if begun is None:  # cancelled this moment
            raise LeftError
        _, part = begun
        job.done = part.done * progress.total + progress.done
        job.total = part.total * progress.total
        job.stage = f"part {part.done + 1} of {part.total}"
        job.changed()

    def _sure(self, row: Row, made: work.Made) -> list[float] | None:
        if not row.job.request.confidence or not self.edits:
            return None
        return work.confidence(self.model, made.codes_KT, row.text)

    def _edit(self, job: Job) -> None:
        part = 1

        def between(progress: Progress) -> None:
            nonlocal part
            self._live([job])
            part += progress.done <= job.done  # a window after another
            job.done, job.total = progress.done, progress.total
            job.stage = (part > 1) * f"part {part}, " + f"codebook {progress.codebook + 1}"
            job.changed()

        made = self._editor.run(job, between)
        self._live([job])
        sures: list[list[float] | None] = [None] * len(made.tokens_BKT)
        if job.request.confidence:
            for number, codes_KT in enumerate(made.tokens_BKT):
                loop = isinstance(made, Loops)
                text = made.texts[number] if loop else work.edited_text(job, made, number)
                sures[number] = work.confidence(self.model, codes_KT, text)
        self._write(job, self._keep_edit, job, made, sures)

    def _live(self, jobs: list[Job]) -> list[Job]:
        """Those jobs that are still wanted; raises `LeftError` where none is."""
        for job in jobs:
            if job.spent + time.monotonic() - self._since > job.budget:
                message = f"took longer than the {job.budget:.3g} s that a job like this may take"
                self._end(job, "failed", RequestError(message, status=504, code="time_limit"))
        wanted = [job for job in jobs if job.state not in ENDED]
        if not wanted:
            raise LeftError
        return wanted

    def _fail(self, job: Job, error: Exception) -> None:
        if isinstance(error, RequestError):
            known = error
        elif isinstance(error, UserError):
            known = RequestError(str(error).replace(f"{self.files.folder}/", ""))
        else:
            number = new_id()[:8]
            log.error("job %s failed, error %s", job.id, number, exc_info=error)
            out = OUT_OF_MEMORY in str(error)
            message, code = f"the device failed; the log has it as error {number}", "device_error"
            if out:
                message = "the device ran out of memory: ask for fewer or shorter clips"
                code = "out_of_memory"
            known = RequestError(message, status=500, code=code)
        self._end(job, "failed", known)

    def _say(self, line: str) -> None:
        """What is said while a program is compiled; waiting jobs say so too."""
        begins = line.startswith("preparing")
        log.info(line)
        with self._lock:
            if begins:
                self._compiling = time.monotonic()
            for job in self._running:
                job.stage = "compiling" if begins else ""
                job.changed()
            if not begins:  # which is not the jobs' fault
                self._since += time.monotonic() - self._compiling

    # --- the writing thread -----------------------------------------------------------------------

    def _write(self, job: Job, keep: Any, *arguments: Any) -> Any:
        """Has `keep` write files in the thread for that."""
        with self._lock:
            self._writing += 1

        def run() -> None:
            try:
                if job.state not in ENDED:
                    keep(*arguments)
            except Exception as error:
                self._fail(job, error)
            finally:
                if job.state in ("failed", "cancelled"):
                    self.files.remove(self.files.job(job.id))
                with self._lock:
                    self._writing -= 1
                    self._lock.notify_all()

        return self._writer.submit(run)

    def _keep_row(self, row: Row, made: work.Made, sure: list[float] | None) -> None:
        spec = self.model.loaded.codec
        clip = work.keep_clip(self.files.job(row.job.id), row, made, self._about, spec)
        clip.confidence = sure
        self._kept(row.job, [clip], row.job.request.n)

    def _keep_edit(self, job: Job, edit: Any, sures: list) -> None:
        folder, spec = self.files.job(job.id), self.model.loaded.codec
        keep = work.keep_loop if isinstance(edit, Loops) else work.keep_edit
        clips = []
        for number, sure in enumerate(sures):
            clips.append(keep(folder, job, edit, number, self._about, spec))
            clips[-1].confidence = sure
        self._kept(job, clips, len(clips))

    def _keep_preview(self, job: Job, wav_CN: Any) -> None:
        content = audio.encoded(Path("preview"), wav_CN, self.model.sample_rate, **audio.WAV)
        store.write(self.files.job(job.id) / "preview.wav", content)
        with self._lock:
            job.preview = True
            job.changed()

    def _kept(self, job: Job, clips: list, total: int) -> None:
        with self._lock:
            there = {clip.index: clip for clip in job.clips}
            new = [clip for clip in clips if clip.index not in there]
            there |= {clip.index: clip for clip in clips}
            job.clips = [there[index] for index in sorted(there)]
            self._made["clips"] += len(new)
            self._made["audio_seconds"] += sum(clip.seconds for clip in new)
            over = len(job.clips) == total
            job.done = job.total if over else job.done
        if over:
            store.write(self.files.job(job.id) / "job.json", json.dumps(record_of(job)))
            self._end(job, "done")
        else:
            job.changed()

    # --- what is known ----------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Numbers for whoever runs the server."""
        stored = self.files.size()
        with self._lock:
            states = collections.Counter(self._ended)
            batches = self._batches.total()
            rows = sum(size * count for size, count in self._batches.items())
            return {
                "model": self.name,
                "process": os.getpid(),
                "ready": self.ready,
                "uptime_seconds": round(time.time() - self.began, 1),
                "queued": sum(job.state == "queued" for job in self._queue.jobs),
                "running": len(self._running),
                **{state: states[state] for state in ENDED},
                **{name: round(value, 3) for name, value in self._made.items()},
                "batches": batches,
                "mean_batch": round(rows / batches, 2) if batches else 0,
                "programs": programs.count(),
                "stored_bytes": stored,
            }

    def _keep_house(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):
                self.expire()
            with self._lock:
                self._lock.wait_for(lambda: self._closed, HOUSEKEEPING)

    def expire(self) -> None:
        """Forgets what is too old: files, and jobs whose files are gone."""
        self.files.expire()
        with self._lock:
            for job in list(self._jobs.values()):
                old = job.state in ENDED and time.time() - job.ended > self.files.keep_seconds
                gone = job.state == "done" and not self.files.job(job.id).exists()
                if old or gone:
                    del self._jobs[job.id]
            for place, (job_id, _) in list(self._keys.items()):
                if job_id not in self._jobs:
                    del self._keys[place]
            self._queue.forget_clients()

    def jobs(self, owner: str = "") -> list[Job]:
        """All jobs of an owner, the oldest first."""
        with self._lock:
            known = set(self._jobs)
        records = list(self.files.records(but=known))
        with self._lock:
            for record in records:
                self._remembered(record)
            own = [job for job in self._jobs.values() if job.owner == owner]
            return sorted(own, key=lambda job: job.created)


def _left(job: Job) -> bool:
    """Whether the device left a job before its work was done, but for taking too long."""
    return job.state == "cancelled" or (job.error is not None and job.error.code != "time_limit")
