"""uvicorn for a page that is open: browsers keep streams to it, which have to end before it can stop."""

import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.routing import Mount

from .answer_line import AnswerLine
from .settings import DemoSettings

# Seconds that pages have to finish when the server stops.
_FAREWELL = 3


class PageHost(uvicorn.Server):
    """Serves a page.

    Args:
        app: the page behind its guards.
        page: Gradio's application, mounted in another.
    """

    def __init__(self, app: Any, page: FastAPI, line: AnswerLine, settings: DemoSettings) -> None:
        config = uvicorn.Config(
            app, settings.host, settings.port, log_level="warning", timeout_graceful_shutdown=_FAREWELL
        )
        super().__init__(config)
        self._line = line
        self._gradio: Any
        [self._gradio] = [route.app for route in page.routes if isinstance(route, Mount)]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers and the streams of open pages, then the server."""
        self._line.stop()
        self._gradio.stop_event.set()
        await super().shutdown(sockets)
