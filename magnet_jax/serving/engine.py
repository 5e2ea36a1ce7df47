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
import logging
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
from magnet_jax.decode.segments import Progress
from magnet_jax.errors import UserError
from magnet_jax.io import audio
from magnet_jax.serving import requests, store, work
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import ENDED, Job, new_id, new_job
from magnet_jax.serving.limits import Limits
from magnet_jax.serving.requests import Request
from magnet_jax.serving.work import Model, Row

log = logging.getLogger(__name__)

WAIT = {"cpu": 0.0}  # seconds for which a batch waits for more; a CPU gains nothing from batches
WAIT_ELSEWHERE = 0.02
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
        self._rows: dict[str, collections.deque[Row]] = {}  # of each queued job, in its order
        self._turns: OrderedDict[str, None] = OrderedDict()  # clients, the next one first
        self._running: list[Job] = []
        self.draining = self._closed = False
        self._keys: OrderedDict[tuple[str, str], tuple[str, bytes]] = OrderedDict()
        self._speed: dict[str, float] = {}  # seconds of a unit of work, see `_units`
        self._batches: collections.Counter = collections.Counter()
        self._ended: collections.Counter = collections.Counter()
        self._made = {"clips": 0, "audio_seconds": 0.0, "busy_seconds": 0.0}
        self.began = time.time()
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
        try:
            for seconds, size in self._to_warm:
                request = requests.Generate(input="a calm melody", seconds=seconds, seed=0)
                row = work.rows_of(new_job(request, "", ""), self.model)[0]
                work.generate(self.model, [row] * size, lambda progress: None)
            self.ready = True
        except Exception as error:
            self.failure = error
        self.warmed.set()

    def drain(self, seconds: float | None = None) -> bool:
        """Takes no more jobs, and waits until those that are there have ended; whether they did."""
        with self._lock:
            self.draining = True
            self._lock.notify_all()
            return self._lock.wait_for(
                lambda: not self._rows and not self._running and not self._writing, seconds
            )

    def close(self) -> None:
        """Cancels what is left, and ends the threads."""
        with self._lock:
            self.draining = self._closed = True
            for job in list(self._jobs.values()):
                self.cancel(job)
            self._lock.notify_all()
        if self._device.is_alive():
            self._device.join()
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
          client: whose turn it takes, see `_next`.
          owner: who may see the job.
          idempotency_key: the same one, of the same owner, gives the same job.

        Raises:
          UserError: a request that cannot be done, now or ever; `RequestError` says when.
        """
        content, place = request.model_dump_json().encode(), (owner, idempotency_key or "")
        with self._lock:
            if place in self._keys and idempotency_key is not None:
                return self._known(*self._keys[place], content)
            job = new_job(request, client, owner)
            self._check(job)
            rows = self._rows_of(job)
            self._check_room(job)
            job.total = sum(row.steps for row in rows)
            self._jobs[job.id] = job
            self._rows[job.id] = collections.deque(rows)
            self._turns.setdefault(client)
            if idempotency_key is not None:
                self._keys[place] = job.id, content
            self._lock.notify_all()
        return job

    def _known(self, job_id: str, before: bytes, content: bytes) -> Job:
        if before != content:
            raise RequestError(
                "this Idempotency-Key was given with another request", status=409,
                code="idempotency_conflict",
            )  # fmt: skip
        return self._jobs[job_id]

    def _rows_of(self, job: Job) -> list[Row]:
        if job.kind == "generate":
            return work.rows_of(job, self.model)
        return [Row(job, 0, (job.id,), work.decoding_of(self.model, job.request), 0, "")]

    def _check(self, job: Job) -> None:
        """Raises `RequestError` for what is beyond the limits, or not there."""
        request, limits = job.request, self.limits

        def require(condition: bool, param: str, message: str, **how: Any) -> None:
            if not condition:
                raise RequestError(f"{param}: {message}", param=param, **how)

        known = request.model in (None, self.name)
        require(known, "model", f"there is {self.name} alone", status=404, code="model_not_found")
        require(request.n <= limits.clips, "n", f"must be at most {limits.clips}")
        for name in ("input", "original"):
            text = getattr(request, name, None) or ""
            require(len(text) <= limits.text, name, f"is longer than {limits.text} characters")
        lengths = [getattr(request, name, None) or 0 for name in ("seconds", "before", "after")]
        longest = min(limits.seconds, self._longest(job.kind))
        require(sum(lengths) <= longest, "seconds", f"must be at most {longest:g}")
        if job.kind == "generate":
            return
        require(self.edits, "model", f"a {self.model.kind} edits nothing: take a MAGNeT")
        for file, clip in self._sources(request):
            if file is not None:
                self.files.about(file, job.owner)
            elif clip is not None:
                made = self.job(clip.id, job.owner)
                there = made.state == "done" and self.audio_path(made, clip.index).exists()
                what = f"job {clip.id} has no clip {clip.index}, or not yet"
                require(there, "job", what, status=409, code="job_not_done")

    @property
    def edits(self) -> bool:
        """Whether the model edits as well."""
        return isinstance(self.model, MAGNeT)

    def _longest(self, kind: str) -> float:
        """Seconds that can be asked for."""
        return self.model.max_duration if kind == "generate" else self.limits.seconds

    @staticmethod
    def _sources(request: Request) -> list[tuple[str | None, requests.Result | None]]:
        found = [(getattr(request, "file", None), getattr(request, "job", None))]
        found.append((getattr(request, "then_file", None), getattr(request, "then_job", None)))
        return found

    def _check_room(self, job: Job) -> None:
        limits, waiting = self.limits, [self._jobs[job_id] for job_id in self._rows]
        own = sum(other.client == job.client for other in waiting)
        if self.draining:
            raise RequestError(
                "the server is ending", status=503, code="shutting_down", retry_after=30
            )
        if not self.ready:
            raise RequestError(
                "the server is warming up", status=503, code="warming_up", retry_after=10
            )
        if len(waiting) >= limits.queue or own >= limits.queue_per_client:
            mine = own >= limits.queue_per_client
            raise RequestError(
                f"{own if mine else len(waiting)} jobs {'of yours ' * mine}are waiting: try later",
                status=429, code="client_limit" if mine else "queue_full",
                retry_after=max(1.0, self._seconds_of(waiting[0]) or 1.0),
            )  # fmt: skip

    def job(self, job_id: str, owner: str = "") -> Job:
        """A job; `RequestError` 404 where there is none, or it is another's."""
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise RequestError(
                "no such job: it was never there, or has expired", status=404, code="not_found"
            )
        return job

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
        return self.files.job(job.id) / f"{index}.wav"

    # --- the queue --------------------------------------------------------------------------------

    def _next(self) -> list[Row]:
        """The rows of the next batch, of which there is one at least; [] where the engine ends.

        The client whose turn it is has its oldest job begun. Others whose clips the same program
        makes may have theirs made along, in turn; of one client there are no more than half a batch
        while others wait.
        """
        with self._lock:
            batch: list[Row] = []
            while not batch:
                self._lock.wait_for(lambda: self._rows or self._closed)
                if self._closed:
                    return []
                batch = self._batch()
                if self._wait and len(batch) < self.limits.max_batch and batch[0].num_frames:
                    self._lock.wait_for(lambda: self._closed, self._wait)
                    batch = self._batch() if self._rows else []
            for row in batch:
                rows = self._rows.get(row.job.id)
                rows.popleft()
                if not rows:
                    del self._rows[row.job.id]
                self._turns.move_to_end(row.job.client)
                self._start(row.job)
            self._running = list(dict.fromkeys(row.job for row in batch))
            return batch

    def _batch(self) -> list[Row]:
        """The rows of the next batch, as things stand."""
        of_client: dict[str, list[Row]] = {client: [] for client in self._turns}
        for job_id, rows in self._rows.items():
            of_client[self._jobs[job_id].client] += rows
        first = next(rows[0] for rows in of_client.values() if rows)
        others = sum(bool(rows) for rows in of_client.values()) > 1
        most = self.limits.max_batch
        share = max(1, most // 2) if others else most
        queues = [
            [row for row in rows if row.key == first.key][:share] for rows in of_client.values()
        ]
        batch: list[Row] = []
        for turn in range(share):
            batch += [rows[turn] for rows in queues if turn < len(rows)]
        return batch[:most]

    def _start(self, job: Job) -> None:
        if job.state == "queued":
            job.state, job.started = "running", time.time()
            limit = max(self.limits.job_seconds, 2 * (self._seconds_of(job) or 0))
            job.deadline = time.monotonic() + limit
            job.changed()

    def _end(self, job: Job, state: str, error: RequestError | None = None) -> None:
        with self._lock:
            if job.state in ENDED:
                return
            self._rows.pop(job.id, None)
            job.state, job.error, job.ended, job.stage = state, error, time.time(), ""
            self._ended[state] += 1
            job.changed()
            self._lock.notify_all()

    # --- time -------------------------------------------------------------------------------------

    def _left(self, job: Job) -> float:
        """How much of a job is left: frames times steps, or of an edit its share."""
        if job.kind == "generate":
            seconds = job.request.seconds or self.model.max_duration
            return seconds * self.model.frame_rate * (job.total - job.done)
        return 1 - job.done / job.total if job.total else 1.0

    def _seconds_of(self, job: Job) -> float | None:
        """Seconds that what is left of a job takes; None where nothing like it was made yet."""
        speed = self._speed.get(job.kind)
        return None if speed is None else self._left(job) * speed

    def _ahead(self, job: Job) -> tuple[int, float | None]:
        """How many jobs come before one, and in how many seconds it will have ended."""
        waiting = [self._jobs[job_id] for job_id in self._rows]
        before = waiting[: waiting.index(job)] if job in waiting else []
        first = [] if job in self._running else [j for j in self._running if j not in before]
        seconds = [self._seconds_of(other) for other in [*first, *before, job]]
        eta = None if None in seconds else sum(seconds)
        return len(first) + len(before), eta

    def _took(self, batch: list[Row], seconds: float) -> None:
        kind = batch[0].job.kind
        units = sum(row.num_frames * row.steps for row in batch) if kind == "generate" else 1
        before = self._speed.get(kind, seconds / units)
        self._speed[kind] = 0.7 * before + 0.3 * seconds / units

    # --- the device thread ------------------------------------------------------------------------

    def _work(self) -> None:
        self._warm()
        while batch := self._next():
            started, compiled = time.perf_counter(), programs.count()
            try:
                self._run(batch)
            finally:
                took = time.perf_counter() - started
                with self._lock:
                    self._made["busy_seconds"] += took
                    self._running = []
                    if programs.count() == compiled:  # nothing was compiled meanwhile
                        self._took(batch, took)
                    self._batches[len(batch)] += 1
                    self._lock.notify_all()

    def _run(self, batch: list[Row]) -> None:
        """Makes a batch; what cannot be made fails the jobs whose fault it is, and no others."""
        try:
            if batch[0].job.kind == "generate":
                self._generate(batch)
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
                    self._run([row])

    def _generate(self, batch: list[Row]) -> None:
        jobs = list({row.job.id: row.job for row in batch}.values())
        before = {job.id: job.done for job in jobs}

        def between(progress: Progress) -> None:
            for job in self._live(jobs):
                count = sum(row.job is job for row in batch)
                job.done = before[job.id] + count * progress.done
                job.stage = f"codebook {progress.codebook + 1}"
                job.changed()
            if progress.done < progress.total and progress.codebook == 0:
                self._previews(batch, progress)

        made = work.generate(self.model, batch, between)
        for row, one in zip(batch, made):
            job = row.job
            if job.state in ENDED:
                continue
            sure = None
            if job.request.confidence and isinstance(self.model, MAGNeT):
                sure = work.confidence(self.model, one.codes_KT, row.text)
            self._write(job, self._keep_row, row, one, sure)

    def _previews(self, batch: list[Row], progress: Progress) -> None:
        """Keeps what the first codebook sounds like, for those who want to hear it."""
        steps = getattr(work.decode_of(batch[0].decoding), "steps", (0,))
        wanted = [i for i, row in enumerate(batch) if row.index == 0 and row.job.request.preview]
        if progress.done != steps[0] or not wanted or len(steps) == 1:
            return
        codes_BKT = jax.device_get(progress.codes_BKT)
        for i in wanted:
            frames = slice(0, batch[i].num_frames)
            wav_CN = decoding.decode_audio(self._first, codes_BKT[i : i + 1, :1, frames])[0]
            self._write(batch[i].job, self._keep_preview, batch[i].job, wav_CN, ends=False)

    @property
    def _first(self) -> Any:
        """The codec's decoder of the first codebook alone."""
        decoder = self.model.decoder
        spec = dataclasses.replace(decoder.spec, num_codebooks=1)
        return decoder._replace(spec=spec)

    def _edit(self, job: Job) -> None:
        def between(progress: Progress) -> None:
            self._live([job])
            job.done, job.total = progress.done, progress.total
            job.stage = f"codebook {progress.codebook + 1}"
            job.changed()

        sources = [self._editor.path(*one) for one in self._sources(job.request) if any(one)]
        with self.files.holding(*(path.parent for path in sources)):
            edit = self._editor.run(job, between)
            self._live([job])
            sures = [None] * len(edit.clips)
            if job.request.confidence:
                text = edit.clips[0].text if job.request.input is None else job.request.input
                sures = [work.confidence(self.model, codes, text) for codes in edit.tokens_BKT]
            # While its source is there.
            self._write(job, self._keep_edit, job, edit, sures).result()

    def _live(self, jobs: list[Job]) -> list[Job]:
        """Those jobs that are still wanted; raises `LeftError` where none is."""
        for job in jobs:
            if job.deadline is not None and time.monotonic() > job.deadline:
                limit = job.deadline - time.monotonic() + time.time() - (job.started or 0)
                self._end(
                    job, "failed",
                    RequestError(
                        f"took longer than the {limit:.0f} s that a job like this may take",
                        status=504, code="time_limit",
                    ),
                )  # fmt: skip
        wanted = [job for job in jobs if job.state not in ENDED]
        if not wanted:
            raise LeftError
        return wanted

    def _fail(self, job: Job, error: Exception) -> None:
        if isinstance(error, RequestError):
            known = error
        elif isinstance(error, UserError):
            known = RequestError(str(error))
        else:
            number = new_id()[:8]
            log.error("job %s failed, error %s", job.id, number, exc_info=error)
            out = "RESOURCE_EXHAUSTED" in str(error)
            message = (
                "the device ran out of memory: ask for fewer or shorter clips"
                if out
                else (f"the device failed; the server's log has it as error {number}")
            )
            known = RequestError(
                message, status=500, code="out_of_memory" if out else "device_error"
            )
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
                if not begins and job.deadline is not None:  # what is not the job's fault
                    job.deadline += time.monotonic() - self._compiling
                job.changed()

    # --- the writing thread -----------------------------------------------------------------------

    def _write(self, job: Job, keep: Any, *arguments: Any, ends: bool = True) -> Any:
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
        clips = []
        for number in range(len(edit.clips)):
            clips.append(work.keep_edit(folder, job, edit, number, self._about, spec))
            clips[-1].confidence = sures[number]
        self._kept(job, clips, len(clips))

    def _keep_preview(self, job: Job, wav_CN: Any) -> None:
        content = audio.encoded(Path("preview"), wav_CN, self.model.sample_rate, **audio.WAV)
        store.write(self.files.job(job.id) / "preview.wav", content)
        with self._lock:
            job.preview = True
            job.changed()

    def _kept(self, job: Job, clips: list, total: int) -> None:
        with self._lock:
            job.clips = sorted([*job.clips, *clips], key=lambda clip: clip.index)
            self._made["clips"] += len(clips)
            self._made["audio_seconds"] += sum(clip.seconds for clip in clips)
            if len(job.clips) == total:
                job.done = job.total
                self._end(job, "done")
            else:
                job.changed()

    # --- what is known ----------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Numbers for whoever runs the server."""
        with self._lock:
            states = collections.Counter(self._ended)
            batches = self._batches.total()
            rows = sum(size * count for size, count in self._batches.items())
            return {
                "model": self.name,
                "ready": self.ready,
                "uptime_seconds": round(time.time() - self.began, 1),
                "queued": sum(self._jobs[job_id].state == "queued" for job_id in self._rows),
                "running": len(self._running),
                **{state: states[state] for state in ENDED},
                **{name: round(value, 3) for name, value in self._made.items()},
                "batches": batches,
                "mean_batch": round(rows / batches, 2) if batches else 0,
                "programs": programs.count(),
                "stored_bytes": self.files.size(),
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
            waiting = {self._jobs[job_id].client for job_id in self._rows}
            self._turns = OrderedDict.fromkeys(c for c in self._turns if c in waiting)

    def jobs(self, owner: str = "") -> Iterator[Job]:
        """All jobs of an owner, the oldest first."""
        with self._lock:
            return iter([job for job in self._jobs.values() if job.owner == owner])
