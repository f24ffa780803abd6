"""A streamed answer as OpenAI's clients expect it: it begins with a word, and `data: [DONE]` ends it."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

DONE = "data: [DONE]\n\n"
_END, _ERROR = "\n\n", 'data: {"error"'


async def finished(parts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The stream of transformers' handler without white space before the first word, and with its end; closes it.

    Args:
        parts: each holds whole events, one or several.
    """
    has_begun = False
    async with aclosing(parts):
        async for part in parts:
            if not has_begun:
                events = part.removesuffix(_END).split(_END)
                for number, event in enumerate(events):
                    if not has_begun:
                        events[number], has_begun = _without_leading_space(event)
                part = _END.join(events) + _END
            yield part
    yield DONE


def _without_leading_space(event: str) -> tuple[str, bool]:
    """An event, and whether it holds a word."""
    if event.startswith(_ERROR):
        return event, False
    chunk = json.loads(event.removeprefix("data: "))
    delta = chunk["choices"][0]["delta"]
    if not delta.get("content"):
        return event, False
    delta["content"] = delta["content"].lstrip()
    return f"data: {json.dumps(chunk, ensure_ascii=False)}", bool(delta["content"])


__all__ = ["DONE", "finished"]
