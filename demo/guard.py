"""Stands before the page: which requests are let through, how long they may be, and which files they may name.

Gradio offers more than this page uses, some of which fetches addresses or runs programs for its clients. Here only the
routes pass that the page needs, and only files pass that were uploaded.
"""

import asyncio
import json
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect

from ..errors import RequestError
from ..serving.asgi import App, Receive, Scope, Send, header, read_body, replaying, respond
from .uploads import UploadFolder

_API = "/gradio_api"
_FILE = f"{_API}/file="
_UPLOAD = f"{_API}/upload"
_READ = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
_READ |= {
    f"{_API}/{name}" for name in ("queue/data", "info", "upload_progress", "startup-events", "app_id", "theme.css")
}
_READ_BELOW = ("/assets/", "/static/", "/svelte/", f"{_API}/heartbeat/")
_WRITE = {_UPLOAD, f"{_API}/queue/join"}
# Of a message: its text, and names of uploads.
_LONGEST_MESSAGE = 1 << 20

# What is still being sent is not read.
_CLOSE = (("connection", "close"),)

_PAGE_HEADERS = {
    # Scripts and styles of Gradio are partly inline. Nothing may be fetched from, or sent to, another server.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
        "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# Whatever an upload is, it is shown as a picture, sound or video or not at all.
_FILE_HEADERS = {**_PAGE_HEADERS, "content-security-policy": "sandbox; default-src 'none'"}


class PageGuard:
    """ASGI middleware.

    Args:
        app: what it guards.
        uploads: the files that requests may name.
        longest_upload: bytes of one request that uploads; a longer one is refused without being read to its end.
    """

    def __init__(self, app: App, uploads: UploadFolder, longest_upload: int) -> None:
        self.app, self.uploads, self.longest_upload = app, uploads, longest_upload
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            path = scope["path"]
            send = _with_headers(send, _FILE_HEADERS if path.startswith(_FILE) else _PAGE_HEADERS)
            refusal = self._refusal(scope)
            if refusal is not None:
                await respond(send, *refusal)
            elif path == _UPLOAD:
                await self._upload(scope, receive, send)
            elif scope["method"] == "POST":
                await self._message(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason for a request that is not let through."""
        path, method = scope["path"], scope["method"]
        if method == "POST":
            if path not in _WRITE:
                return 404, "There is nothing here."
            return None if _from_own_page(scope) else (403, "This request comes from another site.")
        if method not in ("GET", "HEAD"):
            return 405, f"{method} is not used here."
        if path.startswith(_FILE):
            return None if self.uploads.holds(path.removeprefix(_FILE)) else (403, "No upload has this name.")
        return None if path in _READ or path.startswith(_READ_BELOW) else (404, "There is nothing here.")

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an upload through while it is short enough."""
        claimed = int(header(scope, b"content-length") or 0)
        if claimed > self.longest_upload:
            await self._refuse(send)
            return
        await asyncio.to_thread(self.uploads.make_room, claimed or self.longest_upload)
        length, too_long = 0, False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal length, too_long
            message = await receive()
            length += len(message.get("body", b""))
            too_long = too_long or length > self.longest_upload
            return {"type": "http.disconnect"} if too_long else message

        async def unless_too_long(message: MutableMapping[str, Any]) -> None:
            if not too_long:
                await send(message)

        self._uploading += 1
        # Gradio leaves what it has of an upload whose sender is gone, or seems so.
        try:
            with suppress(ClientDisconnect):
                await self.app(scope, counted, unless_too_long)
        finally:
            self._uploading -= 1
            if not self._uploading:
                self.uploads.remove_halves()
        if too_long:
            await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        await respond(send, 413, f"The upload is larger than {self.longest_upload / (1 << 20):g} MB.", headers=_CLOSE)

    async def _message(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a message through that is short enough and names no other files than uploads."""
        body = await read_body(receive, _LONGEST_MESSAGE)
        if body is None:
            await respond(send, 413, f"The message is longer than {_LONGEST_MESSAGE:,} bytes.", headers=_CLOSE)
            return
        try:
            self._require_uploads(body)
        except RequestError as error:
            await respond(send, 400, str(error))
            return
        await self.app(scope, replaying(body, receive), send)

    def _require_uploads(self, body: bytes) -> None:
        try:
            left = [json.loads(body)]
        except (ValueError, RecursionError):
            raise RequestError("The message is no JSON.") from None
        while left:
            value = left.pop()
            if isinstance(value, dict):
                if "path" in value and not (isinstance(value["path"], str) and self.uploads.holds(value["path"])):
                    raise RequestError(
                        "The message names a file that is no upload, or is there no more: add it again."
                    )
                left += value.values()
            elif isinstance(value, list):
                left += value


def _from_own_page(scope: Scope) -> bool:
    """Whether the browser says that the request comes from this page; programs, which say nothing, may ask too."""
    origin = header(scope, b"origin")
    own = {header(scope, b"host"), header(scope, b"x-forwarded-host")} - {""}
    return not origin or urlsplit(origin).netloc in own


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    added = [(name.encode(), value.encode()) for name, value in headers.items()]
    names = {name for name, _ in added}

    async def with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return with_headers
