"""Whether a request is taken on, before it waits: limits, and whether what it names is there."""

from typing import Any, Protocol

from magnet_jax import prompts
from magnet_jax.serving import requests, store
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import Job
from magnet_jax.serving.limits import Limits
from magnet_jax.serving.requests import Request


class Server(Protocol):
    """What is looked at of an engine."""

    name: str
    limits: Limits
    files: store.Store
    ready: bool
    draining: bool
    edits: bool
    model: Any

    def job(self, job_id: str, owner: str = "") -> Job: ...


def sources_of(request: Request) -> list[tuple[str | None, requests.Result | None]]:
    """What a request edits: ids of uploads, or clips of jobs."""
    pairs = (("file", "job"), ("then_file", "then_job"), ("start_file", "start_job"))
    found = [tuple(getattr(request, name, None) for name in pair) for pair in pairs]
    return [pair for pair in found if any(pair)]


def check(job: Job, server: Server) -> None:
    """Raises `RequestError` for what is beyond the limits, or not there."""
    request, limits = job.request, server.limits

    def require(condition: bool, param: str, message: str, **how: Any) -> None:
        if not condition:
            raise RequestError(f"{param}: {message}", param=param, **how)

    known = request.model in (None, server.name)
    require(known, "model", f"there is {server.name} alone", status=404, code="model_not_found")
    require(getattr(request, "n", 1) <= limits.clips, "n", f"must be at most {limits.clips}")
    original = getattr(request, "original", None) or ""
    texts = [original, *prompts.all_texts(request.description or "")]
    longest = max(map(len, texts))
    require(longest <= limits.text, "input", f"is longer than {limits.text} characters")
    lengths = [getattr(request, name, None) or 0 for name in ("seconds", "before", "after")]
    most = limits.seconds
    if job.kind == "loop":
        most = min(most, server.model.max_duration)
    require(sum(lengths) <= most, "seconds", f"must be at most {most:g}")
    there = 0.0  # seconds of what becomes longer
    if job.kind == "generate":
        return
    require(server.edits, "model", f"a {server.model.kind} makes clips of texts alone")
    for file, clip in sources_of(request):
        if file is not None:
            there += server.files.about(file, job.owner)["seconds"]
        else:
            made = server.job(clip.id, job.owner)
            done = made.state == "done" and server.files.clip(made.id, clip.index).exists()
            what = f"job {clip.id} has no clip {clip.index}, or not yet"
            require(done, "job", what, status=409, code="job_not_done")
            there += sum(one.seconds for one in made.clips if one.index == clip.index)
    if job.kind in ("extend", "between"):
        whole = f"must be at most {most:g} in all, with the {there:g} that are there"
        where = "seconds" if job.kind == "between" else "after"
        require(sum(lengths) + there <= most, where, whole)


def check_room(job: Job, waiting: list[Job], server: Server, seconds: float | None) -> None:
    """Raises `RequestError` where no job is taken now; `seconds` is when one of them has ended."""
    if server.draining:
        raise RequestError("the server is ending", status=503, code="shutting_down", retry_after=30)
    if not server.ready:
        raise RequestError(
            "the server is warming up", status=503, code="warming_up", retry_after=10
        )
    limits, own = server.limits, sum(other.client == job.client for other in waiting)
    later = {"status": 429, "retry_after": max(1.0, seconds or 1.0)}
    if own >= limits.queue_per_client:
        raise RequestError(
            f"{own} jobs of yours are waiting: try later", code="client_limit", **later
        )
    if len(waiting) >= limits.queue:
        raise RequestError(
            f"{len(waiting)} jobs are waiting: try later", code="queue_full", **later
        )
