"""The model's inputs of a request, made in a thread: decoding one request's media must not hold up everybody else's.

transformers' handler has them made in the middle of a coroutine, on the event loop. Here it gets a stand-in there, and what
it does next with the inputs, generating, waits for a thread.
"""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any


class LaterInputs:
    """Stands for inputs that are yet to be made."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def to(self, device: Any) -> "LaterInputs":
        """As of a batch of tensors: where they shall be once they are made."""
        return LaterInputs(lambda: self._make().to(device))

    async def made(self, executor: Executor) -> Any:
        """The inputs; raises what making them raises."""
        return await asyncio.get_running_loop().run_in_executor(executor, copy_context().run, self._make)


def postponed(make_inputs: Callable[..., Any]) -> Callable[..., LaterInputs]:
    """The same function, with its work put off."""

    @functools.wraps(make_inputs)
    def later(*args: Any, **kwargs: Any) -> LaterInputs:
        return LaterInputs(functools.partial(make_inputs, *args, **kwargs))

    return later


__all__ = ["LaterInputs", "postponed"]
