"""Refuses prompts that the model has no positions for; transformers would generate behind its last one."""

import functools
from typing import Any

from ..errors import RequestError


def limit_prompts(processor: Any, context: int) -> None:
    """Make a processor raise RequestError for conversations of `context` tokens or more, media included."""
    make_inputs = processor.apply_chat_template

    @functools.wraps(make_inputs)
    def within_context(*args: Any, **kwargs: Any) -> Any:
        inputs = make_inputs(*args, **kwargs)
        length = len(inputs["input_ids"][0])
        if length >= context:
            raise RequestError(
                f"The conversation has {length} tokens, media included; the model takes fewer than {context}: "
                "shorten it."
            )
        if kwargs.get("return_tensors") is None:  # continuous batching takes the ids of one text
            inputs["input_ids"] = inputs["input_ids"][0]
        return inputs

    processor.apply_chat_template = within_context
