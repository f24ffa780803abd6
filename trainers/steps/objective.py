"""The training loss: cross entropy at the answers, with label smoothing, plus the losses of the routers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ...modeling_unimoe.gate_rows_unimoe import StepTotals
from ...modeling_unimoe.losses_unimoe import balance_terms

IGNORED = -100
# Columns of logits are computed in multiples of this many, so that the head sees few different shapes.
_COLUMNS = 4


@dataclass
class LossParts:
    """Scalars, float32. `total` is what is minimised; the others are its unweighted parts, `routers` by their names.

    Each is this batch's part of the optimizer step's: the sum over the step's batches is that of the step. `balanced` and
    `total_balanced` are what `routers` and `total` would be if the experts were used evenly, see `BalanceTerms`.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    total_balanced: torch.Tensor
    routers: dict[str, torch.Tensor] = field(default_factory=dict)
    balanced: dict[str, torch.Tensor] = field(default_factory=dict)


def columns_to_keep(labels: torch.Tensor) -> int:
    """How many of the last positions are needed to predict every labelled token of [B, S] labels."""
    learned = (labels != IGNORED).any(dim=0).nonzero()
    width = labels.shape[1]
    # The token at column c is predicted at column c - 1.
    needed = width - max(int(learned[0]) - 1, 0) if len(learned) else 1
    return min(width, needed + -needed % _COLUMNS)


def training_loss(
    outputs: Any,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_groups: torch.Tensor | None,
    modality_ids: torch.Tensor,
    config: UniMoeTextConfig,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    step: StepTotals | None = None,
) -> LossParts:
    """Loss of a forward pass without labels.

    Args:
        outputs: `logits` [B, K, V] of the last K positions, and `router_logits` (or None).
        labels: [B, S] with S >= K, -100 where nothing is learned.
        token_groups: routing group of every position, [B, S]; None with one group.
        modality_ids: modality id of every position, [B, S].
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        num_items_in_batch: labelled tokens of the whole accumulated batch, by which the sum is divided; None means
            those of this batch.
        step: totals of the whole optimizer step; without them the routers' losses are this batch's own, weighted by its
            share of the labelled tokens.
    """
    logits = outputs.logits
    targets = labels[:, -logits.shape[1] :][:, 1:]
    learned = targets != IGNORED
    # Found once: every mask in a subscript would have the host count its places, in the backward pass again.
    places = learned.nonzero(as_tuple=True)
    chosen = logits[places].float()
    items = learned.sum()
    whole = items if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=items.device)
    divisor = whole.clamp(min=1)  # a step of unreadable samples only has none
    cross_entropy = (
        functional.cross_entropy(chosen, targets[places], reduction="sum", label_smoothing=label_smoothing) / divisor
    )
    plain = cross_entropy.detach()
    if not outputs.router_logits:
        return LossParts(cross_entropy, plain, plain)
    terms = balance_terms(outputs.router_logits, config, modality_ids, token_groups, attention_mask, step)
    share = 1.0 if step is not None else items / divisor
    routers = {name: loss.detach() * share for name, loss in terms.losses.items()}
    balanced = {name: loss * share for name, loss in terms.even.items()}
    total, total_balanced = cross_entropy + terms.weighted * share, plain + terms.weighted_even * share
    return LossParts(total, plain, total_balanced, routers, balanced)
