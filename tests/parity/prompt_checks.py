"""What the tests of prompts against golden data share."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from golden import GoldenMismatchError

from unimoe.processing import original_chat_unimoe


def require(what: str, actual: Any, expected: Any) -> None:
    if actual == expected:
        return
    if isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        index = next(i for i, pair in enumerate(zip(actual, expected, strict=True)) if pair[0] != pair[1])
        raise GoldenMismatchError(f"{what}: {actual[index]!r} instead of {expected[index]!r} at {index}")
    raise GoldenMismatchError(f"{what}: {actual!r} instead of {expected!r}")


def counts_in(warning: str) -> tuple[str, ...]:
    """The two counts that do not match; nothing for no warning, the text itself for a warning of another kind."""
    found = re.search(r"(\d+) vs\. (\d+)", warning)
    return found.groups() if found else tuple(warning.split())


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """Texts that the original's rules log; once each, however often the prompt is encoded."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage()) if record.getMessage() not in texts else None

    handler = Keep(logging.WARNING)
    original_chat_unimoe.logger.addHandler(handler)
    try:
        yield texts
    finally:
        original_chat_unimoe.logger.removeHandler(handler)
