"""What generation needs beside the model's own methods."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import Cache

from .configuration_unimoe import UniMoeConfig
from .configuration_unimoe_text import UniMoeTextConfig
from .errors_unimoe import ModalityError


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
    places_B = mask_BS.sum(dim=1).tolist()
    tokens_per_item = max(sum(places_B) // len(media), 1)
    counts = [places // tokens_per_item for places in places_B]
    return torch.cat([sample for sample in media.split(counts) for _ in range(expand_size)])


def require_texts(inputs: Iterable[Sequence[int]], config: UniMoeConfig) -> None:
    """Raises ModalityError if one of these texts, lists of token ids, has a placeholder of a medium."""
    names = {token_id: modality for modality, token_id in config.placeholder_ids.items() if token_id is not None}
    for index, ids in enumerate(inputs):
        found = next((token for token in ids if token in names), None)
        if found is not None:
            raise ModalityError(
                f"Text {index} has a placeholder for {names[found]}; continuous batching carries no media: give this "
                "text and its media to generate()."
            )


__all__ = ["repeat_media", "require_texts", "restarts_at_longer_rope"]
