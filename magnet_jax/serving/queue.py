"""Which clips are made next, and for whom. The engine holds its lock around every call."""

import collections
import itertools
import time
from collections import OrderedDict

from magnet_jax.serving.jobs import Job
from magnet_jax.serving.work import LONG, Row


class Queue:
    """Rows of jobs that wait; clients take turns."""

    def __init__(self):
        self._rows: OrderedDict[str, collections.deque[Row]] = OrderedDict()  # of each job
        self._turns: OrderedDict[str, None] = OrderedDict()  # clients, the next one first

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def jobs(self) -> list[Job]:
        """Those of which something waits, the oldest first."""
        return [rows[0].job for rows in self._rows.values()]

    def add(self, job: Job, rows: list[Row]) -> None:
        self._rows[job.id] = collections.deque(rows)
        self._turns.setdefault(job.client)

    def drop(self, job: Job) -> None:
        """Forgets what is left of a job."""
        self._rows.pop(job.id, None)

    def next(self, most: int) -> list[Row]:
        """The next batch as things stand; [] where nothing waits.

        The client whose turn it is has its oldest job begun. Clips that the same program makes are
        made along, of each client as many: nobody fills a batch that another one could use.
        """
        of_client: dict[str, list[Row]] = {client: [] for client in self._turns}
        for rows in self._rows.values():
            of_client[rows[0].job.client] += rows
        firsts = [rows[0] for rows in of_client.values() if rows]
        queues = [[row for row in rows if row.key == firsts[0].key] for rows in of_client.values()]
        in_turn = itertools.zip_longest(*queues)  # one of each client, then another one of each
        return [row for rows in in_turn for row in rows if row is not None][:most]

    def take(self, batch: list[Row]) -> None:
        """Takes a batch that `next` gave, and those whose clips are in it wait their turn."""
        for row in batch:
            rows = self._rows[row.job.id]
            rows.remove(row)
            if not rows:
                del self._rows[row.job.id]
            self._turns.move_to_end(row.job.client)

    def forget_clients(self) -> None:
        """Forgets clients that have nothing waiting."""
        waiting = {job.client for job in self.jobs}
        self._turns = OrderedDict.fromkeys(c for c in self._turns if c in waiting)


class Pace:
    """How long work takes, by what such work took; of each kind a moving average."""

    def __init__(self, window_seconds: float, frame_rate: float):
        self._window, self._rate = window_seconds, frame_rate
        self._speed: dict[str, float] = {}  # seconds of a frame's step; or of a frame, or an edit

    def _size(self, job: Job) -> tuple[str, float]:
        """What a job is like, and how much of it there is in all."""
        if job.kind != "generate":
            return job.kind, 1.0
        seconds = job.request.seconds or self._window
        if seconds > self._window:
            return LONG, seconds * self._rate * job.request.n
        return job.kind, seconds * self._rate * job.total

    def seconds_of(self, job: Job) -> float | None:
        """Seconds that what is left of a job takes; None where nothing like it was made yet."""
        kind, size = self._size(job)
        speed = self._speed.get(kind)
        if speed is None:
            return None
        if job.kind == "generate":
            return size * speed * (1 - job.done / job.total if job.total else 1.0)
        # The parts of an edit count from 0 each, and how many there are is not known.
        return max(0.0, size * speed - (time.time() - job.started if job.started else 0.0))

    def took(self, batch: list[Row], share: float, seconds: float) -> None:
        """Notes what a batch took, or such a share of a job that is made alone."""
        kind, size = self._size(batch[0].job)
        size *= share
        if kind == "generate":
            size = sum(row.num_frames * row.steps for row in batch)
        before = self._speed.get(kind, seconds / size)
        self._speed[kind] = 0.7 * before + 0.3 * seconds / size
