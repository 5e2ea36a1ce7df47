"""Who may ask: keys, hosts and origins, and how much may be sent.

A server on 127.0.0.1 is in reach of every page that its user's browser shows. So requests must name
a host that is ours (another name would be a rebound one), and what changes anything must come from
no other origin.
"""

import base64
import binascii
import dataclasses
import hashlib
import hmac
import ipaddress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from magnet_jax.errors import UserError
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import error_view

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health", "/ready")  # which tell nothing, and which probes ask without a key
SHORTEST_KEY = 16  # characters
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"private, no-cache"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask."""

    keys: tuple[str, ...] = ()
    """Bearer keys; none are needed where there are none."""
    hosts: tuple[str, ...] | None = LOOPBACK
    """Names under which the server is asked. None is any where there are keys; where there are none
    it is any address and this machine's own names, as it takes another name to rebind."""
    origins: tuple[str, ...] = ()
    """Other origins whose pages may ask."""

    def owner(self, headers: Headers) -> str:
        """Who asks: '' where there are no keys; `RequestError` 401 for no key, or a wrong one."""
        if not self.keys:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":  # browsers ask for it by themselves; the password is the key
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = ""
        elif scheme.lower() != "bearer":
            given = ""
        found = [key for key in self.keys if hmac.compare_digest(key.encode(), given.encode())]
        if not found:
            raise RequestError(
                "give a key of this server, as 'Authorization: Bearer KEY'", status=401,
                code="invalid_api_key",
            )  # fmt: skip
        return hashlib.sha256(found[0].encode()).hexdigest()[:16]

    def _is_ours(self, name: str) -> bool:
        if self.hosts is not None:
            return name in self.hosts
        return bool(self.keys) or name in LOOPBACK or _is_address(name)

    def check_source(self, method: str, headers: Headers) -> None:
        """Raises `RequestError` 403 for a host that is not ours, or another page's request."""
        host = headers.get("host", "")
        name = _parts(f"//{host}").hostname or ""
        if not self._is_ours(name):
            raise RequestError(
                f"this server is not called {name[:60]!r}: name it with --allow-host",
                status=403, code="forbidden_host",
            )  # fmt: skip
        origin = headers.get("origin")
        if method in SAFE or origin is None or origin in self.origins:
            return
        if _parts(origin).netloc != host or origin == "null":
            raise RequestError(
                f"pages of {origin[:60]} may not ask here: name it with --allow-origin",
                status=403, code="forbidden_origin",
            )  # fmt: skip


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path}: cannot be read ({error})") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-key-file {path}: holds no key; it needs one a line")
    return tuple(checked_key(key, f"--api-key-file {path}") for key in keys)


def checked_key(key: str, where: str) -> str:
    """A key without the blanks around it; `UserError` for one that is soon guessed."""
    key = key.strip()
    if len(key) < SHORTEST_KEY:
        raise UserError(f"{where}: a key needs {SHORTEST_KEY} characters or more")
    return key


def answer(error: RequestError) -> JSONResponse:
    """An error as clients read it."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="magnet_jax", charset="UTF-8"'
    return JSONResponse({"error": error_view(error)}, error.status, headers=headers)


class Gate:
    """Lets requests through that may pass, and no more of a body than is allowed."""

    def __init__(self, app: Any, access: Access, *, body: int, upload: int):
        self.app, self.access, self.body, self.upload = app, access, body, upload

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        most = self.upload if path == "/v1/files" else self.body
        try:
            owner = ""
            if path not in OPEN_PATHS:  # probes ask by the address that they know
                self.access.check_source(method, headers)
                owner = self.access.owner(headers)
            self._check_body(method, path, headers, most)
        except RequestError as error:
            await answer(error)(scope, receive, _with_headers(send))
            return
        client = owner or (scope.get("client") or ("",))[0]
        scope.setdefault("state", {}).update(owner=owner, client=client)
        await self.app(scope, _counted(receive, most), _with_headers(send))

    def _check_body(self, method: str, path: str, headers: Headers, most: int) -> None:
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > most:
            raise _too_large(most)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and path.startswith("/v1/audio/") and kind != "application/json":
            raise RequestError(
                "the content type must be application/json", status=415,
                code="unsupported_media_type",
            )  # fmt: skip


def _too_large(most: int) -> RequestError:
    return RequestError(
        f"the request is larger than {most / 1e6:g} MB", status=413, code="too_large"
    )


def _counted(receive: Any, most: int) -> Any:
    total = 0

    async def counting() -> dict:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise HTTPException(413, str(_too_large(most)))
        return message

    return counting


def _with_headers(send: Any) -> Any:
    async def sending(message: dict) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message.get("headers", [])}
            more = [(name, value) for name, value in HEADERS if name not in there]
            message = message | {"headers": [*message.get("headers", []), *more]}
        await send(message)

    return sending
