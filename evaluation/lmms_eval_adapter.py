"""Models of ours in lmms-eval, which finds this file through the entry point `unimoe` of the group `lmms_eval.models`:

python -m lmms_eval --model unimoe --model_args pretrained=FOLDER --tasks mme --batch_size 8
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from transformers.utils import logging

from ..errors import DataError
from .running.answerers import ChatAnswerer, open_answerer
from .running.requests import Request

logger = logging.get_logger(__name__)

_DEFAULT_LENGTH = 128  # tokens, where a task does not say
_AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus"}
_VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov"}


class UniMoeForLmmsEval(lmms):
    """A model folder of ours.

    Args:
        pretrained: the folder or Hub id.
        batch_size: questions at a time.
        device: cuda if there is one, else cpu; several processes each take the device that accelerate gives them.
    """

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int | str = 8, device: str | None = None, **ignored: Any) -> None:
        super().__init__()
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        usable = device or ("cuda" if torch.cuda.is_available() else "cpu")
        answerer = open_answerer(pretrained, self.accelerator.device if self._world_size > 1 else usable)
        if not isinstance(answerer, ChatAnswerer):
            raise DataError(f"{pretrained} is no unimoe model: lmms-eval has adapters of its own for others.")
        self.answerer = answerer
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers in the order of the requests, cut at the tasks' stop texts."""
        prepared = [self._generation(request) for request in requests]
        answers: dict[int, str] = {}
        order = sorted(range(len(prepared)), key=lambda i: (prepared[i][1], len(prepared[i][0].text)), reverse=True)
        for length in dict.fromkeys(prepared[i][1] for i in order):
            same = [i for i in order if prepared[i][1] == length]
            for start in range(0, len(same), self.batch_size):
                chunk = same[start : start + self.batch_size]
                inputs = self.answerer.prepare([prepared[i][0] for i in chunk])
                for i, text in zip(chunk, self.answerer.generate(inputs, length), strict=True):
                    answers[i] = _cut(text, prepared[i][2])
        return [answers[i] for i in range(len(prepared))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation with the token that ends an answer, and whether greedy search finds it."""
        return [self._likelihood(request) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("unimoe answers single questions in lmms-eval; leave tasks of several rounds out.")

    def _generation(self, request: Any) -> tuple[Request, int, list[str]]:
        context, options, doc_to_visual, doc_id, task, split = request.args
        length = int(options.get("max_new_tokens", _DEFAULT_LENGTH))
        until = options.get("until") or []
        return (
            self._request(context, doc_to_visual, doc_id, task, split),
            length,
            [until] if isinstance(until, str) else until,
        )

    @torch.no_grad()
    def _likelihood(self, request: Any) -> tuple[float, bool]:
        context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(document)
        asked = self._request(context, doc_to_visual, doc_id, task, split).messages
        answer = {"role": "assistant", "content": [{"type": "text", "text": target.strip()}]}
        batch = self.answerer.processor.training_inputs([[*asked, answer]]).to(self.answerer.model.device)
        labels = batch.pop("labels")[0, 1:]
        logits = self.answerer.model(**batch).logits[0, :-1].float()
        learned = labels >= 0
        scores = logits[learned].log_softmax(-1)
        chosen = scores.gather(1, labels[learned][:, None])
        return float(chosen.sum()), bool((scores.argmax(-1) == labels[learned]).all())

    def _request(self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Request:
        media = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        return Request(doc_id, context, tuple(_medium(value) for value in media or []))


def _medium(value: Any) -> dict[str, Any]:
    """A content item of what a task shows: a picture, an array or decoder of sound, or the path of a file."""
    if isinstance(value, str | Path):
        suffix = Path(value).suffix.lower()
        kind = "video" if suffix in _VIDEO_SUFFIXES else "audio" if suffix in _AUDIO_SUFFIXES else "image"
        return {"type": kind, "path": str(value)}
    if isinstance(value, dict) and "array" in value:
        return {"type": "audio", "audio": value["array"], "sampling_rate": value["sampling_rate"]}
    if hasattr(value, "get_all_samples"):  # the decoder of datasets
        samples = value.get_all_samples()
        return {"type": "audio", "audio": samples.data.mean(0).numpy(), "sampling_rate": samples.sample_rate}
    return {"type": "image", "image": value}


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def manifest() -> ModelManifest:
    """What the entry point names."""
    return ModelManifest("unimoe", simple_class_path=f"{__name__}.{UniMoeForLmmsEval.__name__}")
