"""A job: what was asked for, how far it is, what came out."""

import base64
import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from magnet_jax.serving import requests
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.requests import Request

State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")


def new_id() -> str:
    """128 random bits, which nobody guesses."""
    return base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


@dataclasses.dataclass(kw_only=True)
class Clip:
    """A clip that a job made."""

    index: int
    seed: int
    number: int
    seconds: float
    changed: list[list[float]] | None = None  # seconds; None of a clip that is new altogether
    confidence: list[float] | None = None  # mean of each frame's log probabilities, in nats
    has_tokens: bool = True
    loop: dict[str, Any] | None = None  # bpm, bars, beats_per_bar and samples of a loop


@dataclasses.dataclass(kw_only=True, eq=False)
class Job:
    """What the engine holds of a request. The engine alone changes it, under its lock."""

    request: Request
    kind: str
    seed: int
    client: str  # for fairness
    owner: str  # who may see it: a key's hash, or "" where there are no keys
    id: str = dataclasses.field(default_factory=new_id)
    state: State = "queued"
    created: float = dataclasses.field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    done: int = 0  # steps
    total: int = 0
    stage: str = ""
    clips: list[Clip] = dataclasses.field(default_factory=list)
    error: RequestError | None = None
    preview: bool = False  # whether there is one
    budget: float = 0.0  # seconds that the device may take for it
    spent: float = 0.0  # and has taken, up to its last batch
    version: int = 0  # counts changes
    over: threading.Event = dataclasses.field(default_factory=threading.Event)
    _listeners: set[Callable[[], None]] = dataclasses.field(default_factory=set)

    def changed(self) -> None:
        """Tells whoever listens."""
        self.version += 1
        if self.state in ENDED:
            self.over.set()
        for listener in list(self._listeners):
            with contextlib.suppress(RuntimeError):  # of an event loop that has ended
                listener()

    @contextlib.contextmanager
    def heard(self, listener: Callable[[], None]):
        """Has `listener` called, from any thread, at every change."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def wait(self, seconds: float | None = None) -> bool:
        """Until it has ended, for so long at most; whether it has."""
        return self.over.wait(seconds)

    def view(self, position: int | None, eta: float | None) -> dict[str, Any]:
        """What is told of it, as JSON has it."""
        base = f"/v1/jobs/{self.id}"
        return {
            "id": self.id,
            "object": "job",
            "kind": self.kind,
            "state": self.state,
            "created": int(self.created),
            "position": position,
            "eta_seconds": None if eta is None else round(eta, 1),
            "progress": {"done": self.done, "total": self.total, "stage": self.stage},
            "request": self.request.model_dump(mode="json", by_alias=True) | {"seed": self.seed},
            "preview": f"{base}/preview" if self.preview else None,
            "results": [
                {
                    "index": clip.index,
                    "seed": clip.seed,
                    "number": clip.number,
                    "seconds": clip.seconds,
                    "audio": f"{base}/audio/{clip.index}",
                    "tokens": f"{base}/tokens/{clip.index}.npz" if clip.has_tokens else None,
                    "settings": f"{base}/settings/{clip.index}.json",
                    "changed": clip.changed,
                    "confidence": clip.confidence,
                    "loop": clip.loop,
                }
                for clip in self.clips
            ],
            "error": self.error and error_view(self.error),
        }


def error_view(error: RequestError) -> dict[str, Any]:
    """An error in the form that OpenAI's clients read."""
    type_ = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"message": str(error), "type": type_, "param": error.param, "code": error.code}


def new_job(request: Request, client: str, owner: str) -> Job:
    """A job, with a seed where the request has none."""
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    kind = requests.kind_of(request)
    return Job(request=request, kind=kind, seed=seed, client=client, owner=owner)


def record_of(job: Job) -> dict[str, Any]:
    """What is kept of a job that is done, so that another process can tell of it."""
    record = job.view(None, None) | {"state": "done", "owner": job.owner, "ended": time.time()}
    return record | {"clips": [dataclasses.asdict(clip) for clip in job.clips]}


def from_record(record: dict[str, Any]) -> Job:
    """The job that a record is of; KeyError, TypeError or ValueError where it is none."""
    request = requests.KINDS[record["kind"]].model_validate(record["request"])
    job = Job(
        request=request, kind=record["kind"], seed=record["request"]["seed"], client="",
        owner=record["owner"], id=record["id"], state="done", created=record["created"],
        ended=record["ended"], clips=[Clip(**clip) for clip in record["clips"]],
        done=record["progress"]["total"], total=record["progress"]["total"],
        preview=record["preview"] is not None,
    )  # fmt: skip
    job.over.set()
    return job
