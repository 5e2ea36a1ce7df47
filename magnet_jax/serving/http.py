"""The HTTP server's application: routes, errors, and what is told to clients."""

import importlib.metadata
import logging
import re
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from magnet_jax.errors import UserError
from magnet_jax.serving import route_audio, route_files, route_jobs, route_page, route_server
from magnet_jax.serving.access import Access, Gate, answer
from magnet_jax.serving.engine import Engine
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import new_id

log = logging.getLogger(__name__)

Read = Callable[[Path, Path, float], None]
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
ABOUT = """Music from text, by a MAGNeT. A request is answered with the audio; with
`"async": true`, or the header `Prefer: respond-async`, with a job, whose id is then asked for."""


def create_app(
    engine: Engine,
    access: Access,
    read: Read | None = None,
    *,
    page: bool = False,
    log_prompts: bool = False,
) -> FastAPI:
    """The API.

    Args:
      engine: does the work; whoever starts it ends it.
      access: who may ask.
      read: (an uploaded file, the WAV to write, most seconds) reads any sound file, apart from this
        process; without, nothing can be uploaded.
      page: serve the page as well.
      log_prompts: write texts to the log.
    """
    version = importlib.metadata.version("magnet-jax")
    app = FastAPI(
        title="magnet_jax", version=version, description=ABOUT, docs_url=None, redoc_url=None
    )
    app.state.engine, app.state.read, app.state.log_prompts = engine, read, log_prompts
    app.state.uploads = route_files.Uploads()
    for part in (route_audio, route_jobs, route_files, route_server):
        app.include_router(part.router)
    if page:
        route_page.mount(app)
    _answer_errors(app)
    limits = engine.limits
    sizes = {"body": round(limits.body_mb * 1e6), "upload": round(limits.upload_mb * 1e6) + 4096}
    app.add_middleware(Gate, access=access, **sizes)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Job-Id", "X-Seed", "X-Sample-Rate", "Retry-After"],
        )
    return app


def _answer_errors(app: FastAPI) -> None:
    """Has every error answered in one form, with one line, and none with a trace."""

    def user(_: Request, error: UserError) -> JSONResponse:
        return answer(error if isinstance(error, RequestError) else RequestError(str(error)))

    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        message = first["msg"].removeprefix("Value error, ")
        param = ".".join(place) or None
        rule = re.match(r"(\w+): ", message)  # that several fields share
        param = rule[1] if param is None and rule else param
        if first["type"] == "extra_forbidden":
            message = "is no field of this request"
        if place:
            message = f"{'.'.join(place)}: {message}"
        return answer(RequestError(message[:500], param=param))

    def http(_: Request, error: HTTPException) -> JSONResponse:
        code = CODES.get(error.status_code, "invalid_request")
        found = answer(RequestError(str(error.detail), status=error.status_code, code=code))
        found.headers.update(error.headers or {})  # as which methods there are
        return found

    def bug(_: Request, error: Exception) -> JSONResponse:
        number = new_id()[:8]
        log.error("error %s", number, exc_info=error)
        message = f"the server failed; its log has it as error {number}"
        return answer(RequestError(message, status=500, code="server_error"))

    app.add_exception_handler(UserError, user)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)
