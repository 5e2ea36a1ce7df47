"""What the server tells of itself."""

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse

from magnet_jax.config import PRESETS, DecodeConfig, decode_of, preset_steps
from magnet_jax.serving import requests
from magnet_jax.serving.engine import Engine

router = APIRouter(tags=["server"])


@router.get("/health", summary="Whether the process lives")
async def health(request: Request) -> JSONResponse:
    alive = request.app.state.engine.alive
    return JSONResponse({"status": "ok" if alive else "the device's thread has ended"},
                        200 if alive else 503)  # fmt: skip


@router.get("/ready", summary="Whether it takes jobs: 503 while it warms up, or ends")
async def ready(request: Request) -> JSONResponse:
    engine: Engine = request.app.state.engine
    there = engine.ready and not engine.draining
    return JSONResponse({"status": "ready" if there else "not ready"}, 200 if there else 503)


@router.get("/v1/models", summary="The model")
async def models(request: Request) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    model = engine.model
    how = decode_of(model.loaded.config.sampling)
    steps = list(how.steps) if isinstance(how, DecodeConfig) else None
    edits = [kind for kind in requests.KINDS if kind != "generate"] if engine.edits else []
    about = {
        "id": engine.name,
        "object": "model",
        "created": int(engine.began),
        "owned_by": "magnet_jax",
        "kind": model.kind,
        "sample_rate": model.sample_rate,
        "channels": model.audio_channels,
        "frame_rate": model.frame_rate,
        "seconds": model.max_duration,
        "decode": dataclasses.asdict(how),
        "presets": {name: preset_steps(name, len(steps)) for name in PRESETS} if steps else {},
        "makes": ["generate", *edits],
        "limits": dataclasses.asdict(engine.limits),
    }
    return {"object": "list", "data": [about]}


@router.get("/v1/stats", summary="What was done, and what is to be done")
async def stats(request: Request) -> dict[str, Any]:
    return await run_in_threadpool(request.app.state.engine.stats)


@router.get("/metrics", summary="The same for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    values = await run_in_threadpool(request.app.state.engine.stats)
    gauges = ("ready", "queued", "running", "programs", "stored_bytes", "uptime_seconds")
    counters = ("clips", "audio_seconds", "busy_seconds", "batches")
    lines = []
    for names, kind, end in ((gauges, "gauge", ""), (counters, "counter", "_total")):
        for name in names:
            full = f"magnet_jax_{name}{end}"
            lines += [f"# TYPE {full} {kind}", f"{full} {float(values[name]):g}"]
    lines.append("# TYPE magnet_jax_jobs_total counter")
    lines += [
        f'magnet_jax_jobs_total{{state="{state}"}} {values[state]}'
        for state in ("done", "failed", "cancelled")
    ]
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return PlainTextResponse("\n".join(lines) + "\n", media_type=kind)
