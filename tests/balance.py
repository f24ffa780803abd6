"""The load-balancing loss by itself, as tests compare it."""

from typing import Any

import torch

from unimoe import UniMoeTextConfig
from unimoe.modeling_unimoe.balance_loss_unimoe import balance_losses_and_even


def group_balance_losses(
    router_logits: tuple[torch.Tensor, ...], config: UniMoeTextConfig, *token_group_T: Any, **tokens: Any
) -> torch.Tensor:
    """Of every routing group, [G]."""
    return balance_losses_and_even(router_logits, config, *token_group_T, **tokens)[0]


def load_balancing_loss(*args: Any, **tokens: Any) -> torch.Tensor:
    """Of all groups together, a scalar."""
    return group_balance_losses(*args, **tokens).sum()
