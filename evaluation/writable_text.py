"""Texts that go into files. Half of a surrogate pair, which official files may hold, is no character of UTF-8."""

import json
from typing import Any


def is_writable(text: str) -> bool:
    """Whether a text can be encoded; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON as people read it; where that cannot be written, with escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if is_writable(text) else json.dumps(value, indent=indent)
