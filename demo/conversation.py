"""What was said: as the model reads it, and as the page shows it."""

import html
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MediaError, RequestError

Message = dict[str, Any]
SILENCE = "(no words)"
_KINDS = ("image", "audio", "video")
# Python's table of types lacks these, or differs between systems.
_SUFFIXES = {".flac": "audio", ".opus": "audio", ".m4a": "audio", ".mkv": "video", ".webp": "image"}


def question(text: str, files: Sequence[str], takes: Sequence[str], hear_videos: bool = False) -> Message:
    """A user's message.

    Args:
        files: media, in the order in which the model meets them; they come before the text.
        takes: kinds of media that the model takes.
        hear_videos: videos are heard as well as seen.

    Raises:
        RequestError: the model does not take such a file, or there is neither text nor a file.
    """
    if not text.strip() and not files:
        raise RequestError("The message is empty: write something, or add a file.")
    items = [_item(file, takes, hear_videos) for file in files]
    return {"role": "user", "content": [*items, {"type": "text", "text": text.strip()}]}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text.strip() or SILENCE}]}


def kind_of(file: str) -> str | None:
    """ "image", "audio" or "video" by the file's name; None for others."""
    suffix = Path(file).suffix.lower()
    kind = _SUFFIXES.get(suffix) or (mimetypes.guess_type(f"file{suffix}")[0] or "").partition("/")[0]
    return kind if kind in _KINDS else None


def shown(messages: Sequence[Message]) -> list[Message]:
    """A conversation for Gradio's chat: one bubble per medium and text."""
    return [
        {
            "role": message["role"],
            "content": _verbatim(item["text"]) if item["type"] == "text" else {"path": item["path"]},
        }
        for message in messages
        for item in message["content"]
        if item["type"] != "text" or item["text"]
    ]


def bubble(text: str) -> Message:
    """What the page says by itself, or so far, in the model's place."""
    return {"role": "assistant", "content": _verbatim(text)}


def _verbatim(text: str) -> str:
    """Gradio's chat reads HTML, also with Markdown off; here it is text."""
    return html.escape(text, quote=False)


def plainly(error: Exception) -> str:
    """An error as a sentence for somebody who does not know in which message of which list a file lies."""
    if isinstance(error, MediaError):
        return f"The {error.kind} cannot be used: {error.reason.rstrip('.')}."
    return str(error)


def _item(file: str, takes: Sequence[str], hear_videos: bool) -> dict[str, Any]:
    kind = kind_of(file)
    if kind not in takes:
        kinds = ", ".join(takes) or "no files, only text"
        raise RequestError(f"The file {Path(file).name!r} cannot be used here: this model takes {kinds}.")
    item = {"type": kind, "path": file}
    return {**item, "sound_track": True} if kind == "video" and hear_videos else item
