"""Load balancing of routers: the loss that is least when every expert gets as much as the others.

Shape suffixes: T = batch * sequence tokens, L layers, R gate rows of one layer, C those that can be chosen (per group its
experts, then null experts), K experts per token, G groups.
"""

import torch

from .configuration_unimoe_text import UniMoeTextConfig
from .gate_rows_unimoe import (
    StepTotals,
    at_least_something,
    group_sizes,
    over_layers,
    per_group,
    shares,
    valid_tokens,
)
from .routing_dynamic_unimoe import chosen_rows

# Logits, groups, mask and weights of a layer's tokens.
_Layer = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]


def balance_losses_and_even(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    token_group_T: torch.Tensor | None = None,
    attention_mask_T: torch.Tensor | None = None,
    token_weight_T: torch.Tensor | None = None,
    step: StepTotals | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load-balancing loss of every routing group, and what it would be with even choices and probabilities; float32 [G].

    For a group with C rows, null experts included: C * sum_c f_c * P_c, with means over the group's tokens in one
    layer, averaged over layers; or, with `router_aux_loss_layers` "joint", over its tokens in all layers together.

    With `router_type` "top_k", f_c is the share of the group's assignments that went to row c and P_c the mean
    probability of c (Switch Transformer, arXiv 2101.03961, eq. 4-6, extended to top-k by counting all K choices, or with
    `router_aux_loss_counts` "first" the best one). The loss is 1 when the load is even, whatever K and C are (MoIIE's
    own is K times this one, with "joint"). Where choices are drawn or biased, those count that the scores alone make.

    With "dynamic", f_c is the share of tokens that chose c, before any expert dropped one, and P_c the mean probability
    of c among the choices that its token made: choosing less costs less too. An even load costs the mean number of
    choices. Padding that counts (see token_weight_T) chose nothing and has even probabilities.

    Args:
        router_logits: one [T, R] tensor per sparse layer.
        token_group_T: index of each token's group; None with one group.
        attention_mask_T: 1 for tokens, 0 for padding; None means that there is no padding.
        token_weight_T: how much each token counts in the means; by default tokens count 1 and padding 0.
        step: the sums of the step that these tokens are part of; they give their part of its losses then.

    Returns:
        The losses, 0 for a group of which no token counts; and those of even use, sum_c f_c * sum_c P_c: 1 with top-k
        routing, and with "dynamic" the mean number of choices that tokens made.
    """
    losses, even = [], []
    layers = counted_layers(router_logits, config, token_group_T, attention_mask_T, token_weight_T)
    for index, (logits_TR, group_T, mask_T, weight_T) in enumerate(layers):
        if step is None:
            chosen_C, tokens_C = layer_choices(logits_TR, group_T, mask_T, weight_T, config)
        else:
            chosen_C, tokens_C = step.chosen_LC[index], step.tokens_LC[index]
        probability_C = _layer_probabilities(logits_TR, group_T, mask_T, weight_T, config)
        divisor_C = at_least_something(tokens_C)
        share_C, mean_C = chosen_C.detach() / divisor_C, probability_C / divisor_C
        sizes = group_sizes(config)
        products = (share_C * mean_C).split(sizes)
        losses.append(torch.stack([size * own_C.sum() for size, own_C in zip(sizes, products, strict=True)]))
        even.append(_group_sums(share_C, sizes) * _group_sums(mean_C.detach(), sizes))
    return over_layers(losses, config), over_layers(even, config)


def counted_layers(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    token_group_T: torch.Tensor | None,
    attention_mask_T: torch.Tensor | None,
    token_weight_T: torch.Tensor | None,
) -> list[_Layer]:
    """Per layer its logits and its tokens' groups, mask and weights; one layer of all tokens where they count jointly."""
    if config.router_losses_as_released:
        attention_mask_T = None
    if config.router_aux_loss_layers == "joint":
        times = len(router_logits)
        router_logits = (torch.cat(router_logits),)
        token_group_T, attention_mask_T, token_weight_T = (
            None if per_token is None else per_token.repeat(times)
            for per_token in (token_group_T, attention_mask_T, token_weight_T)
        )
    weights_T = attention_mask_T if token_weight_T is None else token_weight_T
    return [
        (logits_TR, token_group_T, attention_mask_T, valid_tokens(logits_TR, weights_T)) for logits_TR in router_logits
    ]


@torch.no_grad()
def layer_choices(
    logits_TR: torch.Tensor,
    token_group_T: torch.Tensor | None,
    attention_mask_T: torch.Tensor | None,
    weight_T: torch.Tensor,
    config: UniMoeTextConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each row was chosen, and by how many tokens it could have been, [C] each, by the tokens' weights."""
    if config.router_type == "dynamic":
        chosen_TC = chosen_rows(logits_TR, config, attention_mask_T).float()
        return (chosen_TC * weight_T[:, None]).sum(dim=0), weight_T.sum().expand(chosen_TC.shape[1])
    counted = config.num_experts_per_tok if config.router_aux_loss_counts == "all" else 1
    chosen, tokens = [], []
    for logits_TC, own_T in per_group(logits_TR, token_group_T, weight_T, config):
        chosen_TC = torch.zeros_like(logits_TC).scatter_(1, logits_TC.topk(counted).indices, 1.0 / counted)
        chosen.append((chosen_TC * own_T[:, None]).sum(dim=0))
        tokens.append(own_T.sum().expand(logits_TC.shape[1]))
    return torch.cat(chosen), torch.cat(tokens)


def _layer_probabilities(
    logits_TR: torch.Tensor,
    token_group_T: torch.Tensor | None,
    attention_mask_T: torch.Tensor | None,
    weight_T: torch.Tensor,
    config: UniMoeTextConfig,
) -> torch.Tensor:
    """The sum of the tokens' probabilities of each row, by the tokens' weights, [C]."""
    if config.router_type == "dynamic":
        chosen_TC = chosen_rows(logits_TR, config, attention_mask_T)
        logits_TC = logits_TR[:, : chosen_TC.shape[1]].float()
        # Not -inf: padding chose nothing, and a softmax over nothing is NaN.
        probability_TC = logits_TC.masked_fill(~chosen_TC, torch.finfo(torch.float32).min).softmax(dim=-1)
        return (probability_TC * weight_T[:, None]).sum(dim=0)
    groups = per_group(logits_TR, token_group_T, weight_T, config)
    return torch.cat([(shares(logits_TC, config) * own_T[:, None]).sum(dim=0) for logits_TC, own_T in groups])


def _group_sums(value_C: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The sum over the rows of every group, [G]."""
    return torch.stack([own_C.sum() for own_C in value_C.split(sizes)])
