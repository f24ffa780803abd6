"""What a chat request may say, checked before the model sees it: an OpenAI-style body has many ways to be wrong."""

import json
import math
from collections.abc import Callable
from typing import Any

from ..errors import RequestError

ROLES = ("system", "user", "assistant", "tool")
# Content parts, and where their text, URL or data is.
_PARTS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "image_url": ("image_url", "url"),
    "video_url": ("video_url", "url"),
    "audio_url": ("audio_url", "url"),
    "input_audio": ("input_audio", "data"),
}
# Texts that end an answer, as in OpenAI's API: transformers makes tables of them whose size grows with both.
_MOST_STOPS, _LONGEST_STOP = 4, 200
# What OpenAI's clients send and transformers' server heeds; `generation_config`, which it would take too, is no client's.
FIELDS = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "user",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "frequency_penalty",
    "seed",
    "stop",
    "n",
}


def require_chat_request(body: Any, longest_answer: int) -> None:
    """Refuse what cannot be answered.

    Args:
        body: the decoded JSON of a request to /v1/chat/completions.
        longest_answer: the most tokens that may be asked for.

    Raises:
        RequestError: names the field, its value and what it may be.
    """
    if not isinstance(body, dict):
        raise RequestError(f"The body is a JSON {type(body).__name__}; it must be an object with `messages`.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("`messages` must be a list of at least one message.")
    for number, message in enumerate(messages):
        _require_message(message, f"messages[{number}]")
    unknown = sorted(set(body) - FIELDS)
    if unknown:
        raise RequestError(f"`{unknown[0][:80]}` is not known here; a request may have {', '.join(sorted(FIELDS))}.")
    tokens = f"a whole number from 1 to {longest_answer}"
    for name, allowed, is_allowed in (
        ("max_tokens", tokens, lambda value: _is_whole(value) and 1 <= value <= longest_answer),
        ("max_completion_tokens", tokens, lambda value: _is_whole(value) and 1 <= value <= longest_answer),
        ("temperature", "0, or a number from 0.01 to 2", lambda v: _is_number(v) and (v == 0 or 0.01 <= v <= 2)),
        ("top_p", "a number above 0 and up to 1", lambda value: _is_number(value) and 0 < value <= 1),
        # transformers multiplies by 1 + penalty, which must be above 0.
        ("frequency_penalty", "a number above -1 and up to 2", lambda value: _is_number(value) and -1 < value <= 2),
        ("seed", "a whole number of up to 63 bits", lambda value: _is_whole(value) and 0 <= value < 1 << 63),
        ("stream", "true or false", lambda value: isinstance(value, bool)),
        ("n", "1", lambda value: value == 1 and not isinstance(value, bool)),
        ("stop", f"1 to {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters", _is_stop),
    ):
        _require_field(body, name, allowed, is_allowed)


def _require_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"{where} must be an object with a `role`, one of {', '.join(ROLES)}.")
    content = message.get("content")
    calls = message.get("tool_calls")
    if calls is not None:
        _require_tool_calls(calls, f"{where}.tool_calls")
    if isinstance(content, str) or (content is None and calls):
        return
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}.content must be a text or a list of parts.")
    for number, part in enumerate(content):
        _require_part(part, f"{where}.content[{number}]")


def _require_tool_calls(calls: Any, where: str) -> None:
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list.")
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not all(isinstance(function.get(k), str) for k in ("name", "arguments")):
            raise RequestError(f"{where}[{number}] needs a function with a name and arguments, both texts.")
        try:
            is_object = isinstance(json.loads(function["arguments"]), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise RequestError(f"{where}[{number}].function.arguments must be a JSON object, written as a text.")


def _require_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        raise RequestError(f"{where}.type is {kind!r}; it must be one of {', '.join(_PARTS)}.")
    value: Any = part
    for name in _PARTS[kind]:
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise RequestError(f"{where} needs a text at {'.'.join(_PARTS[kind])}.")
    if kind == "input_audio" and not isinstance(part["input_audio"].get("format"), str):
        raise RequestError(f"{where} needs input_audio.format, such as 'wav'.")


def _require_field(body: dict[str, Any], name: str, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
    value = body.get(name)
    if value is not None and not is_allowed(value):
        raise RequestError(f"`{name}` is {str(value)[:80]!r}; it must be {allowed}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # Whole numbers may be too large for a float; comparing them is safe.
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not 1 <= len(texts) <= _MOST_STOPS:
        return False
    return all(isinstance(text, str) and 1 <= len(text) <= _LONGEST_STOP for text in texts)
