"""/v1/files: sound files to edit, uploaded once and named by id."""

import collections
import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Request
from fastapi import Path as InPath
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, Response

from magnet_jax.serving import peaks, store
from magnet_jax.serving.engine import Engine
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import new_id

router = APIRouter(prefix="/v1/files", tags=["files"])
FileId = Annotated[str, InPath(max_length=40)]
READ_AT_ONCE = 2
MOST_UPLOADS = 8  # that are received, read or waiting
MOST_OF_CLIENT = 2


class Uploads:
    """Those that are under way. They are read one after another, and keep nothing else waiting."""

    def __init__(self):
        self.threads = anyio.CapacityLimiter(READ_AT_ONCE)
        self._of_client: collections.Counter = collections.Counter()

    @contextlib.contextmanager
    def place(self, client: str) -> Iterator[None]:
        """A place for one of a client; `RequestError` 429 where there is none."""
        own = self._of_client[client] >= MOST_OF_CLIENT
        if own or self._of_client.total() >= MOST_UPLOADS:
            raise RequestError(
                "files of yours are being read: try later" if own else
                "many files are being read: try later",
                status=429, code="client_limit" if own else "queue_full", retry_after=5,
            )  # fmt: skip
        self._of_client[client] += 1
        try:
            yield
        finally:
            self._of_client[client] -= 1
            self._of_client += collections.Counter()  # without those that have none


FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("", summary="Uploads a sound file of any format", status_code=201, openapi_extra=FORM)
async def upload(request: Request) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError(
            "upload the file as multipart/form-data, in a field named file", status=415,
            code="unsupported_media_type",
        )  # fmt: skip
    uploads: Uploads = request.app.state.uploads
    with uploads.place(request.state.client):
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise RequestError("file: give a sound file in a field of this name", param="file")
            return await anyio.to_thread.run_sync(
                keep, engine, request.app.state.read, file.file, request.state.owner,
                limiter=uploads.threads,
            )  # fmt: skip


def keep(engine: Engine, read: Any, file: Any, owner: str) -> dict[str, Any]:
    """Reads an upload in isolation, and keeps it as a WAV with what is known of it."""
    if read is None:
        raise RequestError("this server takes no uploads", status=501, code="not_supported")
    files, limits = engine.files, engine.limits
    file_id = new_id()
    raw, wav = files.coming / file_id, files.coming / f"{file_id}.wav"
    try:
        with store.written():
            digest = _copy(file, raw, limits.upload_mb * 1e6)
        read(raw, wav, limits.upload_seconds)
        about = {"id": file_id, "object": "file", "created": int(time.time()), "owner": owner}
        about |= {"sha256": digest} | peaks.about(wav)
        folder = files.upload(file_id)
        store.write(folder / "about.json", json.dumps(about))
        with store.written():
            wav.replace(folder / "audio.wav")
    finally:
        files.remove(raw)
        files.remove(wav)
    return _told(about)


def _copy(file: Any, path: Path, most: float) -> str:
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    with path.open("wb") as out:
        while block := file.read(2**20):
            size += len(block)
            if size > most:
                raise RequestError(
                    f"file: is larger than {most / 1e6:g} MB", status=413, code="too_large",
                    param="file",
                )  # fmt: skip
            digest.update(block)
            out.write(block)
    return digest.hexdigest()


def _told(about: dict[str, Any]) -> dict[str, Any]:
    about = {name: value for name, value in about.items() if name != "owner"}
    return about | {"audio": f"/v1/files/{about['id']}/audio"}


@router.get("/{file_id}", summary="What is known of an upload")
async def get_file(request: Request, file_id: FileId) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    return _told(engine.files.about(file_id, request.state.owner))


@router.head("/{file_id}/audio", include_in_schema=False)
@router.get("/{file_id}/audio", summary="An upload as a WAV", response_class=FileResponse)
async def get_audio(request: Request, file_id: FileId) -> FileResponse:
    engine: Engine = request.app.state.engine
    engine.files.about(file_id, request.state.owner)
    path = engine.files.upload(file_id) / "audio.wav"
    return FileResponse(path, media_type="audio/wav", filename=f"{file_id}.wav")


@router.delete("/{file_id}", summary="Removes an upload", status_code=204)
async def delete_file(request: Request, file_id: FileId) -> Response:
    engine: Engine = request.app.state.engine
    engine.files.about(file_id, request.state.owner)
    engine.files.remove(engine.files.upload(file_id))
    return Response(status_code=204)
