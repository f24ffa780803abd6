"""Gate rows of a layer and the tokens that they concern: what the routers' losses are computed from.

Shape suffixes: T = batch * sequence tokens, L layers, R gate rows of one layer, C those that can be chosen (per group its
experts, then null experts).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .configuration_unimoe_text import UniMoeTextConfig


class StepTotals(NamedTuple):
    """What all batches of an optimizer step, on all ranks, sum up to; float32.

    The balance loss is a product of two means over tokens, so the losses of parts of a step do not average to that of the
    whole. With the whole's sums, which carry no gradient, those of its parts add up to it exactly, and so do their
    gradients.

    Args:
        chosen_LC: choices of every gate row; one layer where layers count jointly.
        tokens_LC: tokens that could have made them, those of the row's group.
        tokens: tokens that are not padding.
        samples: those that hold two modalities or more.
    """

    chosen_LC: torch.Tensor
    tokens_LC: torch.Tensor
    tokens: torch.Tensor
    samples: torch.Tensor

    def plus(self, other: "StepTotals") -> "StepTotals":
        """The sums of two batches."""
        return StepTotals(*(one + another for one, another in zip(self, other, strict=True)))


def valid_tokens(logits_TR: torch.Tensor, attention_mask_T: torch.Tensor | None) -> torch.Tensor:
    """How much each token counts, float32 [T], on the device of the logits: the mask, or ones without it."""
    if attention_mask_T is None:
        return torch.ones(len(logits_TR), device=logits_TR.device)
    return attention_mask_T.to(logits_TR.device, torch.float32)


def group_sizes(config: UniMoeTextConfig) -> list[int]:
    """C of every group."""
    return [len(group.experts) + config.num_null_experts for group in config.router_groups]


def per_group(
    logits_TR: torch.Tensor, token_group_T: torch.Tensor | None, weight_T: torch.Tensor, config: UniMoeTextConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per group the float32 logits of its rows, and the weights of tokens, 0 for those of other groups."""
    rows = logits_TR[:, : sum(group_sizes(config))].float().split(group_sizes(config), dim=1)
    for index, logits_TC in enumerate(rows):
        yield logits_TC, weight_T if token_group_T is None else weight_T * (token_group_T == index)


def choosable_shares(logits_TR: torch.Tensor, config: UniMoeTextConfig) -> torch.Tensor:
    """Each token's probabilities of all that it can choose, [T, C]; with one group."""
    return shares(logits_TR[:, : logits_TR.shape[1] - config.num_shared_experts].float(), config)


def shares(logits_TC: torch.Tensor, config: UniMoeTextConfig) -> torch.Tensor:
    """Scores by `router_scoring`, normalised over the rows, sigmoids too; [T, C]."""
    if config.router_scoring == "softmax":
        return logits_TC.softmax(dim=-1)
    scores_TC = logits_TC.sigmoid()
    return scores_TC / scores_TC.sum(dim=-1, keepdim=True)


def over_layers(losses: list[torch.Tensor], config: UniMoeTextConfig) -> torch.Tensor:
    """The mean over layers; as released their sum."""
    stacked = torch.stack(losses)
    return stacked.sum(dim=0) if config.router_losses_as_released else stacked.mean(dim=0)


def at_least_something(total: torch.Tensor) -> torch.Tensor:
    """A divisor that is never 0; what it divides is 0 then."""
    return total.clamp(min=torch.finfo(torch.float32).tiny)
