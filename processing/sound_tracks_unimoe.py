"""Which videos are heard as well, where a call asks for the sound of all videos that have some."""

import os
from collections.abc import Mapping
from typing import Any

from .chat_unimoe import read_media
from .media_container_unimoe import open_container
from .media_policy_unimoe import MediaPolicy, refuse_on_failure
from .media_unimoe import open_media


def with_sound_tracks(messages: Any, policy: MediaPolicy) -> Any:
    """Messages whose videos say "sound_track": True if they have one; what an item says itself stays.

    Raises:
        MediaError: a video cannot be opened.
    """
    if not isinstance(messages, list | tuple):
        return messages
    return [_with_sound_tracks(message, f"message {number}", policy) for number, message in enumerate(messages)]


def _with_sound_tracks(message: Any, place: str, policy: MediaPolicy) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return message
    items = []
    for number, item in enumerate(content):
        if isinstance(item, Mapping) and item.get("type") == "video" and item.get("sound_track") is None:
            where = f"{place}, content {number}"
            [medium] = read_media({**item, "encoder": None}, where)
            item = {**item, "sound_track": _has_sound_track(medium.value, policy, where)}
        items.append(item)
    return {**message, "content": items}


def _has_sound_track(value: Any, policy: MediaPolicy, where: str) -> bool:
    if not isinstance(value, str | bytes | bytearray | memoryview | os.PathLike):
        return False  # frames
    guard = refuse_on_failure("video", where, "it is damaged or cannot be decoded")
    with (
        guard,
        open_media(value, "video", policy, where) as stream,
        open_container(stream, "video", where) as container,
    ):
        return bool(container.streams.audio)
