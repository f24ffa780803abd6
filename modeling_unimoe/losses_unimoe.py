"""Every balance term, and the only place where one is computed.

Shape suffixes: T tokens, R gate rows of one layer, C those of one group (experts, then null experts), K experts per
token, E experts.
"""

from typing import NamedTuple

import torch

from .configuration_unimoe_text import UniMoeTextConfig
from .routing_dynamic_unimoe import chosen_rows


class BalanceTerms(NamedTuple):
    """Float32 scalars: `weighted` is what joins the cross entropy, `balance` and `z` are its terms without weights."""

    weighted: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor


def balance_terms(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    token_groups: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    share_of_batch: torch.Tensor | float = 1.0,
) -> BalanceTerms:
    """What the routers add to the training loss.

    Args:
        router_logits: one [T, R] tensor per sparse layer.
        token_groups: routing group of every position, [B, S]; None with one group.
        attention_mask: [B, S], 1 for tokens, 0 for padding; None, or another shape, means no padding.
        share_of_batch: share of an accumulated batch that these tokens are, so that the terms are averaged, not summed.
    """
    groups_T = None if token_groups is None else token_groups.reshape(-1)
    mask_T = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask.reshape(-1)
    balance = load_balancing_loss(router_logits, config, groups_T, mask_T)
    z = router_z_loss(router_logits, mask_T)
    weighted = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
    return BalanceTerms(weighted * share_of_batch, balance, z)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    token_group_T: torch.Tensor | None = None,
    attention_mask_T: torch.Tensor | None = None,
    token_weight_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Load-balancing loss, averaged over layers and, weighted by tokens, over groups.

    Per layer and group with C rows, null experts included: C * sum_c f_c * P_c.

    With `router_type` "top_k", f_c is the share of the group's assignments that went to row c and P_c the mean
    probability of c (Switch Transformer, arXiv 2101.03961, eq. 4-6, extended to top-k by counting all K choices). The
    loss is 1 when the load is even, whatever K and C are.

    With "dynamic", f_c is the share of tokens that chose c, before any expert dropped one, and P_c the mean probability
    of c among the choices that its token made: choosing less costs less too. An even load costs the mean number of
    choices. Padding that counts (see token_weight_T) chose nothing and has even probabilities.

    Args:
        router_logits: one [T, R] tensor per sparse layer.
        token_group_T: index of each token's group; None with one group.
        attention_mask_T: 1 for tokens, 0 for padding; None means that there is no padding.
        token_weight_T: how much each token counts in the means; by default tokens count 1 and padding 0.

    Returns:
        A float32 scalar; 0 when no token counts.
    """
    losses = []
    for logits_TR in router_logits:
        weight_T = _valid_tokens(logits_TR, attention_mask_T if token_weight_T is None else token_weight_T)
        if config.router_type == "dynamic":
            losses.append(_dynamic_layer_balance(logits_TR, config, attention_mask_T, weight_T))
        else:
            losses.append(_layer_balance(logits_TR, config, token_group_T, weight_T))
    return torch.stack(losses).mean()


def _layer_balance(
    logits_TR: torch.Tensor, config: UniMoeTextConfig, token_group_T: torch.Tensor | None, valid_T: torch.Tensor
) -> torch.Tensor:
    total = logits_TR.new_zeros((), dtype=torch.float32)
    first_row = 0
    for index, group in enumerate(config.router_groups):
        size = len(group.experts) + config.num_null_experts
        logits_TC = logits_TR[:, first_row : first_row + size].float()
        first_row += size
        weight_T = valid_T if token_group_T is None else valid_T * (token_group_T == index)
        scores_TC = logits_TC.softmax(-1) if config.router_scoring == "softmax" else logits_TC.sigmoid()
        share_TC = scores_TC / scores_TC.sum(dim=-1, keepdim=True)
        chosen_TC = torch.zeros_like(share_TC).scatter_(1, scores_TC.topk(config.num_experts_per_tok).indices, 1.0)
        load_C = _weighted_mean(chosen_TC, weight_T) / config.num_experts_per_tok
        total = total + size * (load_C * _weighted_mean(share_TC, weight_T)).sum() * weight_T.sum()
    return total / _at_least_something(valid_T.sum())


def _dynamic_layer_balance(
    logits_TR: torch.Tensor, config: UniMoeTextConfig, attention_mask_T: torch.Tensor | None, weight_T: torch.Tensor
) -> torch.Tensor:
    chosen_TC = chosen_rows(logits_TR, config, attention_mask_T)
    num_choosable = chosen_TC.shape[1]
    logits_TC = logits_TR[:, :num_choosable].float()
    # Not -inf: padding chose nothing, and a softmax over nothing is NaN.
    probability_TC = logits_TC.masked_fill(~chosen_TC, torch.finfo(torch.float32).min).softmax(dim=-1)
    chosen_share_C = _weighted_mean(chosen_TC.float(), weight_T)
    return num_choosable * (chosen_share_C * _weighted_mean(probability_TC, weight_T)).sum()


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
    """Share of all assignments to routed experts that each of them received, float32 [layers, E]; rows sum to 1.

    Null experts receive nothing, shared experts everything; neither counts. Tokens that an expert dropped do.
    """
    loads = []
    for logits_TR in router_logits:
        valid_T = _valid_tokens(logits_TR, attention_mask_T)
        if config.router_type == "dynamic":
            chosen_TC = chosen_rows(logits_TR, config, attention_mask_T)
            load_E = (chosen_TC[:, : config.num_experts] * valid_T[:, None]).sum(dim=0)
        else:
            load_E = _top_k_load(logits_TR, config, token_group_T, valid_T)
        loads.append(load_E / load_E.sum().clamp(min=1))
    return torch.stack(loads)


def _top_k_load(
    logits_TR: torch.Tensor, config: UniMoeTextConfig, token_group_T: torch.Tensor | None, valid_T: torch.Tensor
) -> torch.Tensor:
    """Assignments to each expert, [E]; those to null experts are counted behind the last one and cut off."""
    load_E = torch.zeros(config.num_experts + 1, device=logits_TR.device)
    first_row = 0
    for index, group in enumerate(config.router_groups):
        expert_of_row = [*group.experts, *[config.num_experts] * config.num_null_experts]
        weight_T = valid_T if token_group_T is None else valid_T * (token_group_T == index)
        chosen_TK = logits_TR[:, first_row : first_row + len(expert_of_row)].topk(config.num_experts_per_tok).indices
        first_row += len(expert_of_row)
        experts_TK = torch.tensor(expert_of_row, device=logits_TR.device)[chosen_TK]
        load_E.index_add_(0, experts_TK.flatten(), weight_T.repeat_interleave(config.num_experts_per_tok))
    return load_E[:-1]


def _weighted_mean(values_TC: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    return (values_TC * weight_T[:, None]).sum(dim=0) / _at_least_something(weight_T.sum())


def _at_least_something(total: torch.Tensor) -> torch.Tensor:
    """A divisor that is never 0; what it divides is 0 then."""
    return total.clamp(min=torch.finfo(torch.float32).tiny)


def _valid_tokens(logits_TR: torch.Tensor, attention_mask_T: torch.Tensor | None) -> torch.Tensor:
    if attention_mask_T is None:
        return torch.ones(len(logits_TR), device=logits_TR.device)
    return attention_mask_T.to(logits_TR.device, torch.float32)
