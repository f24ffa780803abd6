"""Batched answering: batches of similar length, as large as memory allows; one bad item does not spoil its batch."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils import logging

from ...errors import UniMoeError
from ..writable_text import is_writable
from .answerers import Answerer
from .predictions import Prediction
from .requests import Request

logger = logging.get_logger(__name__)

START_ON_GPU, START_ON_CPU = 64, 8


class BatchAnswerer:
    """Answers requests batch by batch.

    Args:
        answerer: the model.
        batch_size: items per batch; None begins with many and halves the number whenever memory runs out.
        likeliest_letter: take the likeliest letter for the answer where there are options, in place of generated text.
    """

    def __init__(
        self, answerer: Answerer, batch_size: int | None, on_gpu: bool = False, likeliest_letter: bool = False
    ) -> None:
        self.answerer, self.likeliest_letter = answerer, likeliest_letter
        self.may_shrink = batch_size is None
        self.batch_size = batch_size or (START_ON_GPU if on_gpu else START_ON_CPU)

    def run(self, requests: Sequence[Request], max_new_tokens: int, done: Callable[[list[Prediction]], None]) -> None:
        """Hand over the predictions of every batch as soon as they are there."""
        reasons = [_why_unanswerable(request) for request in requests]
        unanswerable = [failure(r, why) for r, why in zip(requests, reasons, strict=True) if why]
        if unanswerable:
            done(unanswerable)
        answerable = [r for r, why in zip(requests, reasons, strict=True) if not why]
        waiting = sorted(answerable, key=lambda r: (len(r.media), len(r.text)), reverse=True)
        if self.likeliest_letter:
            waiting.sort(key=lambda request: bool(request.letters))
        while waiting:
            batch = waiting[: self.batch_size]
            if self.likeliest_letter:  # sorted: those with options come last
                batch = [request for request in batch if bool(request.letters) == bool(batch[0].letters)]
            predictions = self._predict(batch, max_new_tokens)
            if predictions is None:
                continue  # with a smaller batch
            done(predictions)
            waiting = waiting[len(batch) :]

    def _predict(self, batch: Sequence[Request], max_new_tokens: int) -> list[Prediction] | None:
        """The predictions of a batch; None if memory ran out and the next one will be smaller."""
        import torch

        try:
            return self._answer(batch, max_new_tokens)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                return [failure(batch[0], "out of memory")]
            if not self.may_shrink:
                raise UniMoeError(
                    f"Memory ran out with batches of {self.batch_size}: give a smaller --batch-size, or auto."
                ) from None
            self.batch_size = len(batch) // 2
            logger.warning(f"Memory ran out; going on with batches of {self.batch_size}.")
            return None

    def _answer(self, batch: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        try:
            prompts = self.answerer.prompts(batch)
            inputs = self.answerer.prepare(batch)
        except (UniMoeError, ValueError) as error:  # media and conversations that the processor refuses
            if len(batch) == 1:
                return [failure(batch[0], f"{type(error).__name__}: {error}")]
            return [prediction for request in batch for prediction in self._answer([request], max_new_tokens)]
        if self.likeliest_letter and batch[0].letters:
            texts = self.answerer.likeliest_letters(inputs, [request.letters for request in batch])
        else:
            texts = self.answerer.generate(inputs, max_new_tokens)
        return [
            {"id": request.id, "prompt": prompt, "prediction": text}
            for request, prompt, text in zip(batch, prompts, texts, strict=True)
        ]


def _why_unanswerable(request: Request) -> str:
    if request.missing:
        return f"missing: {', '.join(request.missing)}"
    return "" if is_writable(request.text) else "the question holds half of a surrogate pair, which is no character"


def failure(request: Request, reason: str) -> dict[str, Any]:
    """The prediction of an item that could not be answered."""
    return {"id": request.id, "prompt": request.text, "error": reason}
