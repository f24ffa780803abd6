"""What was said: as the model reads it, and as the page shows it."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MediaError, RequestError

Message = dict[str, Any]
SILENCE = "(no words)"
# Not the system's table of types, which differs between systems.
SUFFIXES = {
    "image": [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"],
    "audio": [".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac"],
    "video": [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"],
}


def question(text: str, files: Sequence[str], takes: Sequence[str], hear_videos: bool = False) -> Message:
    """A user's message.

    Args:
        files: media, in the order in which the model meets them; they come before the text.
        takes: kinds of media that the model takes.
        hear_videos: videos that have a sound track are heard as well as seen.

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
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


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
    return {**item, "sound_track": False} if kind == "video" and not hear_videos else item
