"""One model, many people: who asks waits in line; an answer that nobody waits for any more is not finished."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from ..errors import RequestError, UniMoeError
from ..serving.answering import Answerer, Reply

logger = logging.get_logger(__name__)

# Seconds after which whoever waits hears that nothing is new, and so can notice that the page was closed.
_SIGN_OF_LIFE = 1.0


class AnswerLine:
    """Answers one conversation after the other, in the order in which they were asked.

    Attributes: turns, who is answered (the first) and who waits.

    Args:
        answerer: the model; used by one thread at a time.
        longest: people who are answered or wait at once.
    """

    def __init__(self, answerer: Answerer, longest: int) -> None:
        self.answerer, self.longest = answerer, longest
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self.turns: list[Turn] = []
        self._is_stopped = False

    def ask(self, messages: list[dict[str, Any]]) -> "Turn":
        """Take a place in the line; to be called in an event loop.

        Raises:
            RequestError: the line is full, or has been stopped.
        """
        if self._is_stopped:
            raise RequestError("The server is stopping: nothing is answered any more.")
        if len(self.turns) >= self.longest:
            raise RequestError(
                f"{self.longest} people are being answered or wait already, and no more are let in: try again soon."
            )
        turn = Turn(self, asyncio.get_running_loop())
        self.turns.append(turn)
        turn.begin(self._worker.submit(self._answer, turn, messages))
        return turn

    def ahead_of(self, turn: "Turn") -> int:
        """How many others come first."""
        return self.turns.index(turn) if turn in self.turns else 0

    def leave(self, turn: "Turn") -> None:
        """Called in the event loop when a turn is over."""
        self.turns.remove(turn)

    def stop(self) -> None:
        """End every answer and let nobody in any more."""
        self._is_stopped = True
        for turn in list(self.turns):
            turn.stop()

    def close(self) -> None:
        """Wait for the end of what is being answered."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _answer(self, turn: "Turn", messages: list[dict[str, Any]]) -> Reply | None:
        if turn.stopped.is_set():
            return None
        until = StoppingCriteriaList([_StopWhenAsked(turn.stopped, self.answerer.needs(messages).context)])
        return self.answerer(messages, turn.show, stopping_criteria=until)


class Turn:
    """A place in the line and then an answer.

    Attributes: text, what was written so far; reply, the whole answer once `progress` has ended: partial after `stop`,
    None if it was stopped before it began.
    """

    def __init__(self, line: AnswerLine, loop: asyncio.AbstractEventLoop) -> None:
        self._line, self._loop = line, loop
        self._news = asyncio.Event()
        self._future: Future[Reply | None] = Future()
        self.stopped = threading.Event()
        self.text = ""
        self.reply: Reply | None = None

    @property
    def ahead(self) -> int:
        """How many others are answered first."""
        return self._line.ahead_of(self)

    def begin(self, future: "Future[Reply | None]") -> None:
        self._future = future
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._finish))

    def stop(self) -> None:
        """End the answer after the token that is being made; what was written so far stays."""
        self.stopped.set()
        self._future.cancel()  # takes it out of the line, unless it has begun

    def show(self, piece: str) -> None:
        """More text; called by the thread that generates."""
        self._loop.call_soon_threadsafe(self._append, piece)

    async def progress(self) -> AsyncGenerator[None, None]:
        """Yields whenever there is something new to show, and every second; leaving it early stops the answer.

        Raises:
            UniMoeError: the conversation cannot be answered, or answering failed.
        """
        try:
            while not self._future.done():
                yield
                await self._wait()
            self.reply = self._outcome()
        finally:
            self.stop()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._news.wait(), _SIGN_OF_LIFE)
        except TimeoutError:
            return
        self._news.clear()

    def _append(self, piece: str) -> None:
        self.text += piece
        self._news.set()

    def _finish(self) -> None:
        self._line.leave(self)
        self._news.set()

    def _outcome(self) -> Reply | None:
        if self._future.cancelled():
            return None
        error = self._future.exception()
        if error is None:
            return self._future.result()
        if isinstance(error, UniMoeError):
            raise error
        # A bug, or memory that ran out: whoever runs the server wants to know it, and the page goes on.
        logger.error("An answer failed.", exc_info=error)
        raise RequestError(
            f"The model failed at this conversation ({type(error).__name__}); the server's log says how. Try another."
        )


class _StopWhenAsked(StoppingCriteria):
    """Ends the generation when its turn is stopped, and where the model has no further positions."""

    def __init__(self, stopped: threading.Event, context: int) -> None:
        self.stopped, self.context = stopped, context

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        ended = self.stopped.is_set() or input_ids.shape[1] >= self.context
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]
