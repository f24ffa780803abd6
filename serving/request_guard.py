"""Reads the body of every request within a limit and checks those that ask the model something."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..errors import RequestError
from .request_checks import require_chat_request

CHAT = "/v1/chat/completions"
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequestGuard:
    """ASGI middleware.

    Args:
        app: what it guards.
        longest_body: bytes; a longer request is answered with 413 without being read to its end.
        longest_answer: see `require_chat_request`.
    """

    def __init__(self, app: App, longest_body: int, longest_answer: int) -> None:
        self.app, self.longest_body, self.longest_answer = app, longest_body, longest_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = await self._read(receive)
        if body is None:
            await _answer(send, 413, f"The request is longer than {self.longest_body:,} bytes: send smaller media.")
            return
        try:
            if scope["path"].rstrip("/") == CHAT:
                require_chat_request(_parsed(body), self.longest_answer)
        except RequestError as error:
            await _answer(send, 400, str(error))
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or what came of it before its sender left; None when it is too long."""
        chunks, length, more = [], 0, True
        while more:
            message = await receive()
            chunks.append(message.get("body", b""))
            length += len(chunks[-1])
            if length > self.longest_body:
                return None
            more = message.get("more_body", False)
        return b"".join(chunks)


def error_body(message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
        raise RequestError(f"The body is no JSON: {str(error)[:200]}") from None


async def _answer(send: Send, status: int, message: str) -> None:
    content = json.dumps(error_body(message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
