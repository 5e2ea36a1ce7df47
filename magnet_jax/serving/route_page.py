"""The page: files that the browser gets as they are. All that it does, it asks of the API."""

from pathlib import Path

from fastapi import APIRouter, FastAPI
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from magnet_jax.config import ASSETS

FOLDER = Path(__file__).parent / "page"
EXAMPLE = ASSETS / "clips" / "02_bach.flac"
# Nothing of another origin is loaded or shown within one, and no text becomes a script.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

router = APIRouter(include_in_schema=False)


@router.get("/", response_class=FileResponse)
async def index() -> FileResponse:
    return FileResponse(
        FOLDER / "index.html",
        headers={"Content-Security-Policy": POLICY, "Permissions-Policy": "microphone=(self)"},
    )


@router.get("/page/example.flac", response_class=FileResponse)
async def example() -> FileResponse:
    return FileResponse(EXAMPLE, media_type="audio/flac", filename=EXAMPLE.name)


def mount(app: FastAPI) -> None:
    """Has an application serve the page as well."""
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=FOLDER), name="page")
