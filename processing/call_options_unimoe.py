"""The many forms in which transformers' callers pass options, media and conversations, brought to one."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import PIL.Image

from .chat_unimoe import MediaItem, check_encodable
from .media_policy_unimoe import OptionError, PlaceholderError

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
_PADDING = ("longest", "max_length", "do_not_pad")


def merge_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options from flat and nested ones (text_kwargs, common_kwargs).

    Raises:
        TypeError: an option is unknown.
        OptionError: padding, max_length or pad_to_multiple_of has an impossible value.
    """
    options: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in ("text_kwargs", "common_kwargs"):
            options |= {key: item for key, item in (value or {}).items() if item is not None}
        elif value is not None:
            options[name] = value
    if unknown := set(options) - CALL_OPTIONS - {"do_sample_frames", "return_metadata", "use_audio_in_video"}:
        raise TypeError(f"UniMoeProcessor got unknown options {sorted(unknown)}; known are {sorted(CALL_OPTIONS)}.")
    _check_values(options)
    options["audio_kwargs"] = options.get("audio_kwargs") or {}
    options.setdefault("sampling_rate", options["audio_kwargs"].get("sampling_rate"))
    return options


def template_call_options(
    kwargs: dict[str, Any], processor_kwargs: Mapping[str, Any] | None, return_tensors: str | None
) -> dict[str, Any]:
    """Options of a call of `apply_chat_template`, as of `merge_options`, taken out of kwargs; the chat template's stay there."""
    kwargs.pop("sanitize_control_tokens", None)  # always on
    flat = {name: kwargs.pop(name) for name in CALL_OPTIONS & set(kwargs)}
    options = merge_options({**(processor_kwargs or {}), **flat})
    if return_tensors not in (None, "auto"):
        options["return_tensors"] = return_tensors
    return options


def _check_values(options: Mapping[str, Any]) -> None:
    padding = options.get("padding", True)
    if not isinstance(padding, bool) and padding not in _PADDING:
        raise OptionError(f"padding is {padding!r}; use True, False or one of {_PADDING}.")
    for name in ("max_length", "pad_to_multiple_of"):
        value = options.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise OptionError(f"{name} is {value!r}; use a whole number from 1 on, or leave it out.")


def prompts_of(text: Any) -> list[str]:
    """The prompts in `text`, one or several.

    Raises:
        TypeError: something else than strings.
        OptionError, ConversationError: an empty list, or characters that no tokenizer can encode.
    """
    if isinstance(text, str):
        text = [text]
    if isinstance(text, bytes | Mapping) or not isinstance(text, Iterable):
        raise TypeError(f"UniMoeProcessor: text is a {type(text).__name__}, not a string or a list of strings.")
    prompts = list(text)
    if not prompts:
        raise OptionError("UniMoeProcessor: text is an empty list; give one prompt at least, or None for media alone.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"UniMoeProcessor: text {index} is a {type(prompt).__name__}, not a string.")
        check_encodable(prompt, f"text {index}")
    return prompts


def media_items(media: Mapping[str, Any], sampling_rate: int | None) -> list[MediaItem]:
    """All media, by kind, each named by its place among its kind."""
    return [
        MediaItem(kind, value, sampling_rate=sampling_rate, where=f"{kind} {index}")
        for kind, values in media.items()
        for index, value in enumerate(flatten_media(values, kind))
    ]


def counts_per_text(media: Mapping[str, Any], texts: int) -> dict[str, list[int]]:
    """By kind, how many media each of so many texts has; only of the kinds that are given as one list per text.

    Raises:
        PlaceholderError: another number of lists than texts.
    """
    counts: dict[str, list[int]] = {}
    for kind, values in media.items():
        if _is_list_per_text(values, kind):
            counts[kind] = [len(flatten_media(value, kind)) for value in values]
            if len(values) != texts:
                raise PlaceholderError(
                    f"{kind}: {len(values)} lists of media for {texts} texts; give one list per text, or one flat list."
                )
    return counts


def _is_list_per_text(values: Any, kind: str) -> bool:
    if not isinstance(values, list | tuple) or _is_one_medium(values, kind):
        return False
    if not all(value is None or isinstance(value, list | tuple) for value in values):
        return False
    return any(value is not None and not _is_one_medium(value, kind) for value in values)


def flatten_media(values: Any, kind: str) -> list[Any]:
    """A flat list of media from one medium, a list of them, or one list per text."""
    if values is None:
        return []
    if not isinstance(values, list | tuple):
        return [values]
    if _is_one_medium(values, kind):
        return [values]
    flat: list[Any] = []
    for value in values:
        flat += flatten_media(value, kind) if isinstance(value, list | tuple) else ([] if value is None else [value])
    return flat


def _is_one_medium(values: list[Any] | tuple[Any, ...], kind: str) -> bool:
    """Whether a list or tuple is a clip with its rate, the frames of a video, or samples."""
    is_pair = kind == "audio" and isinstance(values, tuple) and len(values) == 2 and np.ndim(values[1]) == 0
    is_frames = kind == "video" and bool(values) and all(isinstance(value, PIL.Image.Image) for value in values)
    is_numbers = bool(values) and isinstance(values[0], int | float | np.number)
    return is_pair or is_frames or is_numbers


def is_batched(conversation: Any) -> bool:
    if not isinstance(conversation, list | tuple) or not conversation:
        return False
    return isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")


def messages_of(conversation: Any) -> Any:
    return getattr(conversation, "messages", conversation)
