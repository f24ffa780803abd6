"""Continuous batching: requests of text alone join and leave one running batch, token by token.

transformers offers it (`transformers serve --continuous-batching`, paged attention), but not to models that take media:
there ours answers one request after the other. Here a request without media goes into the batch, and every other takes the
ordinary way, on its own, at the same time.
"""

import math
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, __version__
from transformers.cli.serving.utils import GenerationState
from transformers.generation.logits_process import (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import UniMoeError
from .request_checks import FIELDS

# Tokens that a page of the cache holds, and that one step of the batch takes at most.
PAGE, STEP = 64, 512
# What a request may say and still be one of many under the same sampling settings: those of the model.
_SHARED_FIELDS = FIELDS - {"top_p", "frequency_penalty", "seed", "stop"}
_PROCESSORS = (SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

# Whether the request that is being handled may join the batch.
joins_batch: ContextVar[bool] = ContextVar("joins_batch", default=False)


class TextBatching(GenerationState):
    """Generates texts together where `joins_batch` says so, everything else one by one.

    Args:
        cache_tokens: what the cache of all texts in the batch holds.
    """

    def __init__(self, cache_tokens: int) -> None:
        pages = math.ceil(cache_tokens / PAGE)
        super().__init__(
            continuous_batching=True,
            cb_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=pages,
                max_batch_tokens=STEP,
                use_cuda_graph=False,  # while one is recorded, no other request could use the device
            ),
        )

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return joins_batch.get()


def may_join(body: dict[str, Any], settings: GenerationConfig) -> bool:
    """Whether a checked request has neither media nor sampling settings of its own.

    Args:
        settings: the model's; all requests of a batch share them.
    """
    given = {name for name, value in body.items() if value is not None}
    own_temperature = body.get("temperature") is not None and (body["temperature"] > 0 or bool(settings.do_sample))
    return given <= _SHARED_FIELDS and not own_temperature and all(map(_is_text, body["messages"]))


def _is_text(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return not isinstance(content, list) or all(part["type"] == "text" for part in content)


def can_batch() -> bool:
    """Whether this release of transformers can serve a request alone while a batch runs; 5.17 cannot, 5.23 can."""
    return "page_size" in {field.name for field in fields(ContinuousBatchingConfig)}


def require_batchable(model: Any) -> None:
    """Refuse models whose answers would depend on what else is in the batch.

    Raises:
        UniMoeError: names what stands in the way.
    """
    if not can_batch():
        raise UniMoeError(
            f"--continuous-batching needs transformers 5.23; this is {__version__}. Leave the option out."
        )
    text = model.config.get_text_config()
    obstacles = []
    if text.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        obstacles.append(f"its rotary embeddings ({text.rope_parameters['rope_type']}) depend on the longest text")
    if text.expert_capacity_factor is not None:
        obstacles.append("its experts have a capacity that all texts share (expert_capacity_factor)")
    others = [p for p in model._get_logits_processor(model.generation_config) if not isinstance(p, _PROCESSORS)]
    if others:
        obstacles.append(f"its generation_config.json asks for {type(others[0]).__name__}, which needs whole texts")
    if obstacles:
        raise UniMoeError(
            f"--continuous-batching cannot serve this model: {'; '.join(obstacles)}. Leave the option out."
        )


__all__ = ["TextBatching", "can_batch", "joins_batch", "may_join", "require_batchable"]
