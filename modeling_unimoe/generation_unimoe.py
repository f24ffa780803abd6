"""What generation needs beside the model's own methods."""

from typing import Any

import torch
from transformers import Cache

from .configuration_unimoe_text import UniMoeTextConfig


def restarts_at_longer_rope(config: UniMoeTextConfig, length: int, past_key_values: Any) -> bool:
    """Whether a text of this length outgrows the short factors of "longrope" while the cache still holds keys of them.

    Keys that were turned by the short factors do not go with queries turned by the long ones, so the cache must be
    computed anew, once (Phi-3 in transformers does the same).
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "longrope" or not isinstance(past_key_values, Cache):
        return False
    past, border = past_key_values.get_seq_length(), rope["original_max_position_embeddings"]
    return 0 < past <= border < length


def repeat_media(media: torch.Tensor, mask_BS: torch.Tensor, expand_size: int) -> torch.Tensor:
    """Repeat every sample's items `expand_size` times, sample by sample; the mask marks their places in the text."""
    places_B = mask_BS.sum(dim=1)
    tokens_per_item = int(places_B.sum()) // len(media)
    counts = (places_B // max(tokens_per_item, 1)).tolist()
    return torch.cat([sample for sample in media.split(counts) for _ in range(expand_size)])


__all__ = ["repeat_media", "restarts_at_longer_rope"]
