"""What a decoder sees after media were merged into its text, as the originals fill it up."""

from typing import Any

import torch

from unimoe import UniMoeForCausalLM


def zero_beyond(model: UniMoeForCausalLM, lengths: list[int]) -> list[torch.Tensor]:
    """Make the decoder see zero vectors after each row's length, as the original fills up rows after merging.

    Returns a list that receives the embeddings that the decoder gets.
    """
    seen: list[torch.Tensor] = []

    def fill(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds = kwargs["inputs_embeds"]
        valid = torch.arange(embeds.shape[1])[None] < torch.tensor(lengths)[:, None]
        seen.append(embeds * valid[..., None])
        return args, {**kwargs, "inputs_embeds": seen[-1]}

    model.model.language_model.register_forward_pre_hook(fill, with_kwargs=True)
    return seen
