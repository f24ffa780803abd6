"""Every balance term, and the only place where one is computed.

Shape suffixes: T tokens, R gate rows of one layer, K experts per token.
"""

import torch

from .configuration_unimoe_text import UniMoeTextConfig


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    token_group_T: torch.Tensor | None = None,
    attention_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Load-balancing loss, averaged over layers and, weighted by tokens, over groups.

    Per layer and group with C experts: C * sum_e f_e * P_e, where f_e is the share of the group's assignments that went
    to expert e and P_e the mean probability of e (Switch Transformer, arXiv 2101.03961, eq. 4-6, extended to top-k by
    counting all K choices). It is 1 when the load is even, whatever K and C are.

    Args:
        router_logits: one [T, R] tensor per sparse layer.
        token_group_T: index of each token's group; None with one group.
        attention_mask_T: 1 for tokens that count, 0 for padding; None counts all.

    Returns:
        A float32 scalar; 0 when no token counts.
    """
    return torch.stack(
        [_layer_balance(logits, config, token_group_T, attention_mask_T) for logits in router_logits]
    ).mean()


def _layer_balance(
    logits_TR: torch.Tensor,
    config: UniMoeTextConfig,
    token_group_T: torch.Tensor | None,
    attention_mask_T: torch.Tensor | None,
) -> torch.Tensor:
    valid_T = _valid_tokens(logits_TR, attention_mask_T)
    total = logits_TR.new_zeros((), dtype=torch.float32)
    first_row = 0
    for index, group in enumerate(config.router_groups):
        size = len(group.experts)
        logits_TC = logits_TR[:, first_row : first_row + size].float()
        first_row += size
        weight_T = valid_T if token_group_T is None else valid_T * (token_group_T == index)
        num_tokens = weight_T.sum()
        scores_TC = logits_TC.softmax(-1) if config.router_scoring == "softmax" else logits_TC.sigmoid()
        share_TC = scores_TC / scores_TC.sum(dim=-1, keepdim=True)
        chosen_TC = torch.zeros_like(share_TC).scatter_(1, scores_TC.topk(config.num_experts_per_tok).indices, 1.0)
        load_C = (chosen_TC * weight_T[:, None]).sum(0) / (num_tokens.clamp(min=1) * config.num_experts_per_tok)
        mean_share_C = (share_TC * weight_T[:, None]).sum(0) / num_tokens.clamp(min=1)
        total = total + size * (load_C * mean_share_C).sum() * num_tokens
    return total / valid_T.sum().clamp(min=1)


def router_z_loss(
    router_logits: tuple[torch.Tensor, ...], attention_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared log-sum-exp of the gate's logits (ST-MoE, arXiv 2202.08906, eq. 5), averaged over layers."""
    per_layer = []
    for logits_TR in router_logits:
        valid_T = _valid_tokens(logits_TR, attention_mask_T)
        z_T = logits_TR.float().logsumexp(dim=-1).square()
        per_layer.append((z_T * valid_T).sum() / valid_T.sum().clamp(min=1))
    return torch.stack(per_layer).mean()


def expert_load(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    token_group_T: torch.Tensor | None = None,
    attention_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Share of all assignments that each expert received, float32 [layers, E]; rows sum to 1."""
    loads = []
    for logits_TR in router_logits:
        valid_T = _valid_tokens(logits_TR, attention_mask_T)
        load_E = torch.zeros(config.num_experts, device=logits_TR.device)
        first_row = 0
        for index, group in enumerate(config.router_groups):
            size = len(group.experts)
            weight_T = valid_T if token_group_T is None else valid_T * (token_group_T == index)
            chosen_TK = logits_TR[:, first_row : first_row + size].topk(config.num_experts_per_tok).indices
            first_row += size
            experts = torch.tensor(group.experts, device=logits_TR.device)[chosen_TK]
            load_E.index_add_(0, experts.flatten(), weight_T.repeat_interleave(config.num_experts_per_tok))
        loads.append(load_E / load_E.sum().clamp(min=1))
    return torch.stack(loads)


def _valid_tokens(logits_TR: torch.Tensor, attention_mask_T: torch.Tensor | None) -> torch.Tensor:
    if attention_mask_T is None:
        return torch.ones(len(logits_TR), device=logits_TR.device)
    return attention_mask_T.to(logits_TR.device, torch.float32)
