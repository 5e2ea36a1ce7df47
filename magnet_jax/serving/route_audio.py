"""POST /v1/audio/...: what is to be made; the answer is audio, or a job."""

import asyncio
import logging
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from magnet_jax.serving import clips, requests
from magnet_jax.serving.access import answer
from magnet_jax.serving.engine import Engine
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import Job

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/audio", tags=["audio"])
DISCONNECTED = 0.25  # seconds between two looks at whether a client is still there
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The audio, or a ZIP of several clips. The headers X-Job-Id, X-Seed and "
        "X-Sample-Rate tell which.",
        "content": {
            "audio/wav": {}, "audio/flac": {}, "audio/mpeg": {}, "application/zip": {},
        },
    },
    202: {"description": "A job, where the request asks for one."},
}  # fmt: skip

Prefer = Annotated[str | None, Header()]
Key = Annotated[str | None, Header(max_length=200)]


async def handle(request: Request, body: requests.Request, prefer: str | None, key: str | None):
    """Does what is asked for, or begins to."""
    engine: Engine = request.app.state.engine
    job = await run_in_threadpool(
        engine.submit, body, client=request.state.client, owner=request.state.owner,
        idempotency_key=key,
    )  # fmt: skip
    text = repr(body.description) if request.app.state.log_prompts else ""
    log.info("%s %s %s", job.kind, job.id, text)  # one line, whatever the text holds
    if body.asynchronous or "respond-async" in (prefer or ""):
        headers = {"Location": f"/v1/jobs/{job.id}", "X-Job-Id": job.id}
        view = await run_in_threadpool(engine.view, job)
        return JSONResponse(view, 202, headers=headers)
    left = await until_over(request, job)
    if left and key is None:  # with a key, the client may come back for it
        await run_in_threadpool(engine.cancel, job)
    if left:
        return Response(status_code=499)
    if job.state == "cancelled":
        raise RequestError("the job was cancelled", status=409, code="cancelled")
    if job.error is not None:
        error = answer(job.error)
        error.headers["X-Job-Id"] = job.id
        return error
    return await run_in_threadpool(audio_of, engine, job)


async def until_over(request: Request, job: Job, seconds: float | None = None) -> bool:
    """Waits for the end of a job; True where the client has left meanwhile."""
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    end = None if seconds is None else loop.time() + seconds

    def listen() -> None:
        if job.over.is_set():
            loop.call_soon_threadsafe(over.set)

    with job.heard(listen):
        while not job.over.is_set():
            if await request.is_disconnected():
                return True
            left = DISCONNECTED if end is None else min(DISCONNECTED, end - loop.time())
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(over.wait(), left)
            except TimeoutError:
                continue
    return False


def audio_of(engine: Engine, job: Job) -> Response:
    """A job's clip, or a ZIP of all of them."""
    wanted = job.request.response_format
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.seed)}
    if len(job.clips) == 1:
        path, rate = clips.file_of(engine, job, 0, wanted)
        headers["X-Sample-Rate"] = str(rate)
        name = clips.name_of(job, 0, wanted)
        return FileResponse(path, media_type=clips.TYPES[wanted], filename=name, headers=headers)
    path, rate = clips.zip_of(engine, job, wanted)
    headers["X-Sample-Rate"] = str(rate)
    name = clips.name_of(job, None, "zip")
    return FileResponse(path, media_type="application/zip", filename=name, headers=headers)


def _route(kind: str, cls: type[requests.Request]) -> None:
    async def route(
        request: Request, body: cls, prefer: Prefer = None, idempotency_key: Key = None
    ):
        return await handle(request, body, prefer, idempotency_key)

    router.add_api_route(
        f"/{kind}", route, methods=["POST"], responses=ANSWERS, name=kind,
        summary=(cls.__doc__ or "").strip(), response_class=Response, operation_id=kind,
    )  # fmt: skip


for _kind, _cls in requests.KINDS.items():
    _route(_kind, _cls)
