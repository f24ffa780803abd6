"""The many forms in which transformers' callers pass options, media and conversations, brought to one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image

CALL_OPTIONS = {
    "padding",
    "padding_side",
    "pad_to_multiple_of",
    "truncation",
    "max_length",
    "return_tensors",
    "return_mm_token_type_ids",
    "add_special_tokens",
    "sampling_rate",
    "images_kwargs",
    "videos_kwargs",
    "audio_kwargs",
}


def merge_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options from flat and nested ones (text_kwargs, common_kwargs).

    Raises:
        TypeError: an option is unknown.
    """
    options: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in ("text_kwargs", "common_kwargs"):
            options |= value or {}
        elif value is not None:
            options[name] = value
    if unknown := set(options) - CALL_OPTIONS - {"do_sample_frames", "return_metadata", "use_audio_in_video"}:
        raise TypeError(f"UniMoeProcessor got unknown options {sorted(unknown)}; known are {sorted(CALL_OPTIONS)}.")
    options["audio_kwargs"] = options.get("audio_kwargs") or {}
    options.setdefault("sampling_rate", options["audio_kwargs"].get("sampling_rate"))
    return options


def flatten_media(values: Any, kind: str) -> list[Any]:
    """A flat list of media from one medium, a list of them, or one list per text."""
    if values is None:
        return []
    if not isinstance(values, list | tuple):
        return [values]
    is_pair = kind == "audio" and isinstance(values, tuple) and len(values) == 2 and np.ndim(values[1]) == 0
    is_frames = kind == "video" and values and all(isinstance(value, PIL.Image.Image) for value in values)
    is_numbers = bool(values) and isinstance(values[0], int | float | np.number)
    if is_pair or is_frames or is_numbers:
        return [values]
    flat: list[Any] = []
    for value in values:
        flat += flatten_media(value, kind) if isinstance(value, list | tuple) else ([] if value is None else [value])
    return flat


def is_batched(conversation: Any) -> bool:
    if not isinstance(conversation, list | tuple) or not conversation:
        return False
    return isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")


def messages_of(conversation: Any, sound_tracks: bool = False) -> Any:
    """The messages of a conversation; `sound_tracks` asks for that of every video that does not say otherwise."""
    messages = getattr(conversation, "messages", conversation)
    if not sound_tracks or not isinstance(messages, list | tuple):
        return messages
    return [_with_sound_tracks(message) for message in messages]


def _with_sound_tracks(message: Any) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return message
    shown = [
        {"sound_track": True, **item} if isinstance(item, Mapping) and item.get("type") == "video" else item
        for item in content
    ]
    return {**message, "content": shown}
