"""Which positions of a text may look at which."""

from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .configuration_unimoe_text import UniMoeTextConfig


def without_packed(attention_mask: Any, cu_seq_lens_q: torch.Tensor | None) -> Any:
    """The mask, unless several texts share a row: transformers keeps those apart by their positions, or by the finished
    mask [1, 1, S, keys] that it brings along where it batches requests continuously."""
    if cu_seq_lens_q is None or getattr(attention_mask, "ndim", 0) == 4:
        return attention_mask
    return None


def causal_mask_of(
    config: UniMoeTextConfig,
    attention_mask: Any,
    x_BSH: torch.Tensor,
    past_key_values: Cache | None,
    position_ids: torch.Tensor,
) -> Any:
    """What the attention implementation wants: earlier positions only, within the sliding window if there is one."""
    make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    return make_mask(
        config=config,
        inputs_embeds=x_BSH,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


__all__ = ["causal_mask_of", "without_packed"]
