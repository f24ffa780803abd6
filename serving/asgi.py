"""What guards before a server share: reading a request's body within a limit, and answering without the application."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def read_body(receive: Receive, longest: int) -> bytes | None:
    """The body, or what came of it before its sender left; None, and no further reading, when it has too many bytes."""
    chunks, length, more = [], 0, True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        length += len(chunks[-1])
        if length > longest:
            return None
        more = message.get("more_body", False)
    return b"".join(chunks)


def replaying(body: bytes, receive: Receive) -> Receive:
    """For the application behind a guard that has read the body: gives it again, then what comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replay


def header(scope: Scope, name: bytes) -> str:
    """The last header of that name; "" for none."""
    return next((value.decode("latin-1") for key, value in reversed(scope["headers"]) if key == name), "")


async def respond(
    send: Send, status: int, text: str, kind: str = "text/plain", headers: tuple[tuple[str, str], ...] = ()
) -> None:
    """A whole response."""
    content = text.encode()
    sent = (("content-type", f"{kind}; charset=utf-8"), ("content-length", str(len(content))), *headers)
    encoded = [(name.encode(), value.encode()) for name, value in sent]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})


__all__ = ["App", "Receive", "Scope", "Send", "header", "read_body", "replaying", "respond"]
