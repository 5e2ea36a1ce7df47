"""/v1/jobs: how far they are, what they made, and their end."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import soundfile
from fastapi import APIRouter, Header, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from magnet_jax.edit import kept
from magnet_jax.serving import clips, peaks
from magnet_jax.serving.engine import Engine
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import ENDED, Job
from magnet_jax.serving.route_audio import until_over

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
KEEP_ALIVE = 15.0  # seconds after which a line is sent where nothing happens
RETRY = 2000  # milliseconds after which a client that lost a stream asks again

JobId = Annotated[str, Path(max_length=40)]
Index = Annotated[int, Path(ge=0, le=1000)]


async def _job(request: Request, job_id: str) -> tuple[Engine, Job]:
    engine: Engine = request.app.state.engine
    # Its record may be on the disk alone; and the engine's lock is not waited for here.
    return engine, await run_in_threadpool(engine.job, job_id, request.state.owner)


@router.get("", summary="All jobs of yours that are known")
def list_jobs(request: Request) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    return {"object": "list", "data": [engine.view(j) for j in engine.jobs(request.state.owner)]}


@router.get("/{job_id}", summary="A job; `wait` is for its end, so many seconds at most")
async def get_job(
    request: Request, job_id: JobId, wait: Annotated[float, Query(ge=0, le=60)] = 0.0
) -> dict[str, Any]:
    engine, job = await _job(request, job_id)
    if wait:
        await until_over(request, job, wait)
    return await run_in_threadpool(engine.view, job)


@router.delete("/{job_id}", summary="Cancels a job", status_code=202)
async def cancel_job(request: Request, job_id: JobId) -> dict[str, Any]:
    engine, job = await _job(request, job_id)
    await run_in_threadpool(engine.cancel, job)
    return await run_in_threadpool(engine.view, job)


@router.get("/{job_id}/events", summary="A job as server-sent events", response_class=Response)
async def job_events(
    request: Request,
    job_id: JobId,
    last_event_id: Annotated[str | None, Header(max_length=40)] = None,
) -> StreamingResponse:
    engine, job = await _job(request, job_id)
    # What happened before is told by the state as it is: there is nothing to send again.
    seen = int(last_event_id) if (last_event_id or "").isdecimal() else -1
    return StreamingResponse(_events(engine, job, seen), media_type="text/event-stream")


async def _events(engine: Engine, job: Job, seen: int) -> AsyncIterator[str]:
    changed, loop, previewed = asyncio.Event(), asyncio.get_running_loop(), False
    with job.heard(lambda: loop.call_soon_threadsafe(changed.set)):
        yield f"retry: {RETRY}\n\n"
        while True:
            changed.clear()
            version, view = job.version, await run_in_threadpool(engine.view, job)
            if version != seen or job.state in ENDED:
                event = {"done": "done", "failed": "error", "cancelled": "error"}
                name = event.get(view["state"], "progress")
                if view["preview"] and not previewed and name == "progress":
                    name, previewed = "preview", True
                seen = version
                yield f"id: {version}\nevent: {name}\ndata: {json.dumps(view)}\n\n"
            if view["state"] in ENDED:
                return
            try:
                await asyncio.wait_for(changed.wait(), KEEP_ALIVE)
            except TimeoutError:
                yield ": still there\n\n"


async def _done(request: Request, job_id: str, index: int) -> tuple[Engine, Job]:
    engine, job = await _job(request, job_id)
    if all(clip.index != index for clip in job.clips):
        if job.state == "done":
            raise RequestError(f"the job has no clip {index}", status=404, code="not_found")
        raise RequestError(
            f"clip {index} is not there: the job is {job.state}", status=409, code="job_not_done"
        )
    return engine, job


@router.head("/{job_id}/audio/{index}", include_in_schema=False)
@router.get("/{job_id}/audio/{index}", summary="A clip", response_class=FileResponse)
async def job_audio(
    request: Request,
    job_id: JobId,
    index: Index,
    format: Literal["wav", "flac", "mp3"] = "wav",
) -> FileResponse:
    engine, job = await _done(request, job_id, index)
    path, _ = await run_in_threadpool(clips.file_of, engine, job, index, format)
    name = clips.name_of(job, index, format)
    return FileResponse(path, media_type=clips.TYPES[format], filename=name)


@router.get(
    "/{job_id}/zip", summary="All clips, with settings and tokens", response_class=FileResponse
)
async def job_zip(
    request: Request, job_id: JobId, format: Literal["wav", "flac", "mp3"] = "wav"
) -> FileResponse:
    engine, job = await _done(request, job_id, 0)
    if job.state != "done":
        raise RequestError(f"the job is {job.state}", status=409, code="job_not_done")
    path, _ = await run_in_threadpool(clips.zip_of, engine, job, format)
    name = clips.name_of(job, None, "zip")
    return FileResponse(path, media_type="application/zip", filename=name)


@router.get("/{job_id}/preview", summary="The first codebook", response_class=FileResponse)
async def job_preview(request: Request, job_id: JobId) -> FileResponse:
    engine, job = await _job(request, job_id)
    return _file(engine.files.job(job.id) / "preview.wav", "preview.wav", "audio/wav")


@router.get("/{job_id}/peaks/{index}.json", summary="What is drawn of a clip")
async def job_peaks(request: Request, job_id: JobId, index: Index) -> dict[str, Any]:
    engine, job = await _done(request, job_id, index)
    try:
        return await run_in_threadpool(peaks.about, engine.audio_path(job, index))
    except soundfile.LibsndfileError:
        raise RequestError("the clip has expired", status=404, code="not_found") from None


@router.get("/{job_id}/tokens/{index}.npz", summary="A clip's tokens", response_class=FileResponse)
async def job_tokens(request: Request, job_id: JobId, index: Index) -> FileResponse:
    engine, job = await _done(request, job_id, index)
    path = engine.audio_path(job, index).with_suffix(kept.SUFFIX)
    name = clips.name_of(job, index, "tokens.npz")
    return _file(path, name, "application/octet-stream")


@router.get("/{job_id}/settings/{index}.json", summary="How a clip was made")
async def job_settings(request: Request, job_id: JobId, index: Index) -> Response:
    engine, job = await _done(request, job_id, index)
    path = engine.audio_path(job, index).with_suffix(".json")
    if not path.exists():
        raise RequestError("the clip has expired", status=404, code="not_found")
    return JSONResponse(json.loads(await run_in_threadpool(path.read_text, "utf-8")))


def _file(path: Any, name: str, kind: str) -> FileResponse:
    if not path.exists():
        raise RequestError(f"there is no {name}, or it has expired", status=404, code="not_found")
    return FileResponse(path, media_type=kind, filename=name)
