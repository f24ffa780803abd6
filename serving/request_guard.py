"""Reads the body of every request within a limit and checks those that ask the model something."""

import json
from typing import Any

from ..errors import RequestError
from .asgi import App, Receive, Scope, Send, read_body, replaying, respond
from .request_checks import require_chat_request

CHAT = "/v1/chat/completions"


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
        body = await read_body(receive, self.longest_body)
        if body is None:
            await _refuse(send, 413, f"The request is longer than {self.longest_body:,} bytes: send smaller media.")
            return
        try:
            if scope["path"].rstrip("/") == CHAT:
                require_chat_request(_parsed(body), self.longest_answer)
        except RequestError as error:
            await _refuse(send, 400, str(error))
            return
        await self.app(scope, replaying(body, receive), send)


def error_body(message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
        raise RequestError(f"The body is no JSON: {str(error)[:200]}") from None


async def _refuse(send: Send, status: int, message: str) -> None:
    await respond(send, status, json.dumps(error_body(message)), "application/json")
