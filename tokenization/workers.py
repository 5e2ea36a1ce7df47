"""Who makes the units of a job on this machine: this process, or several that it starts."""

import functools
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from magnet_jax.errors import PassingError, end_with_parent
from magnet_jax.io import machine
from magnet_jax.io.torch_env import import_torch
from tokenization.maker import Maker
from tokenization.settings import Job
from tokenization.track import Reject
from tokenization.units import Done, Unit


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
            text += f", rejected: {reasons(self.rejects)}"
        self.bar.set_postfix_str(text, refresh=False)


def reasons(rejects: Sequence[Reject]) -> str:
    """How many there are for each reason."""
    counts = Counter(reject.reason for reject in rejects)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


# Makes units, given with their numbers, in any order.
Making = Callable[[Job, dict[int, Unit], Progress], Iterator[tuple[int, Done]]]


def make_here(job: Job, units: dict[int, Unit], progress: Progress) -> Iterator[tuple[int, Done]]:
    """The units in order, made in this process."""
    if not units:
        return
    with Maker(job, job.device) as make:
        for i, unit in units.items():
            yield i, make(unit, progress.add)


def make_in_workers(
    job: Job, units: dict[int, Unit], progress: Progress
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


_worker: Callable[[Unit], Done] | None = None  # of this process


def _start_worker(job: Job, parent: int, numbers: Any, events: Any) -> None:
    global _worker
    end_with_parent(parent)
    machine.keep_freed()
    torch = import_torch()
    torch.set_num_threads(max(1, machine.num_cpus() // job.workers))

    @functools.cache
    def maker() -> Maker:  # made with the first unit: what is raised here says nothing
        device = job.device
        if device == "cuda":
            device = f"cuda:{numbers.get() % max(torch.cuda.device_count(), 1)}"
        return Maker(job, device)

    def work(unit: Unit) -> Done:
        return maker()(unit, lambda files, seconds: events.put((files, seconds)))

    _worker = work


def _make_in_worker(unit: Unit) -> Done:
    return _worker(unit)
