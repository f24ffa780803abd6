"""Every loss of the routers, and the only place where one is computed.

With `router_losses_as_released` three of them follow the code of Uni-MoE's 8-expert variant to the letter. Then layers
and samples are summed, so that weights mean something else for every batch size and depth; padding counts, as text; and
the mean gates that the divergence compares go through a second softmax, which leaves little of their difference.

Shape suffixes: B batch, S sequence, T = B * S tokens, R gate rows of one layer, C those of one group (experts, then null
experts), K experts per token, E experts, M modalities.
"""

from typing import NamedTuple

import torch
from transformers.utils.generic import maybe_autocast

from .configuration_unimoe_text import LOSS_COEFFICIENTS, MODALITIES, UniMoeTextConfig
from .routing_dynamic_unimoe import chosen_rows

# The pairs that the released code compares: the second one's use of experts is measured by that of the first.
_RELEASED_PAIRS = (("image", "speech"), ("image", "text"), ("speech", "text"), ("speech", "video"), ("video", "text"))


class BalanceTerms(NamedTuple):
    """Float32: the scalar `weighted` is what joins the cross entropy, `losses` its terms, unweighted, by their names.

    aux_loss_G: the groups' parts of "aux_loss".
    """

    weighted: torch.Tensor
    losses: dict[str, torch.Tensor]
    aux_loss_G: torch.Tensor


def balance_terms(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    modality_ids: torch.Tensor,
    token_groups: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    share_of_batch: torch.Tensor | float = 1.0,
) -> BalanceTerms:
    """What the routers add to the training loss; the names are those in `LOSS_COEFFICIENTS`.

    Losses that look at modalities are there only when their coefficient is not 0.

    Args:
        router_logits: one [B * S, R] tensor per sparse layer.
        modality_ids: modality id of every position, [B, S].
        token_groups: routing group of every position, [B, S]; None with one group.
        attention_mask: [B, S], 1 for tokens, 0 for padding; None, or another shape, means no padding.
        share_of_batch: share of an accumulated batch that these tokens are, so that the terms are averaged, not summed.
    """
    mask_BS = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask
    mask_T = None if mask_BS is None else mask_BS.reshape(-1)
    groups_T = None if token_groups is None else token_groups.reshape(-1)
    aux_loss_G = group_balance_losses(router_logits, config, groups_T, mask_T)
    losses = {"aux_loss": aux_loss_G.sum(), "z_loss": router_z_loss(router_logits, mask_T, config, groups_T)}
    if config.router_modality_loss_coef:
        losses["modality_loss"] = modality_loss(router_logits, config, modality_ids, mask_BS)
    if config.router_divergence_loss_coef:
        losses["divergence_loss"] = divergence_loss(router_logits, config, modality_ids, mask_BS)
    terms = [(aux_loss_G * aux_loss_G.new_tensor(config.aux_loss_coefs)).sum()]
    terms += [getattr(config, LOSS_COEFFICIENTS[name]) * loss for name, loss in losses.items() if name != "aux_loss"]
    return BalanceTerms(torch.stack(terms).sum() * share_of_batch, losses, aux_loss_G)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    token_group_T: torch.Tensor | None = None,
    attention_mask_T: torch.Tensor | None = None,
    token_weight_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of `group_balance_losses` over the groups, a float32 scalar."""
    return group_balance_losses(router_logits, config, token_group_T, attention_mask_T, token_weight_T).sum()


def group_balance_losses(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    token_group_T: torch.Tensor | None = None,
    attention_mask_T: torch.Tensor | None = None,
    token_weight_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Load-balancing loss of every routing group, float32 [G].

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

    Returns:
        0 for a group of which no token counts.
    """
    losses = []
    if config.router_losses_as_released:
        attention_mask_T = None
    if config.router_aux_loss_layers == "joint":
        times = len(router_logits)
        router_logits = (torch.cat(router_logits),)
        token_group_T, attention_mask_T, token_weight_T = (
            None if per_token is None else per_token.repeat(times)
            for per_token in (token_group_T, attention_mask_T, token_weight_T)
        )
    for logits_TR in router_logits:
        weight_T = _valid_tokens(logits_TR, attention_mask_T if token_weight_T is None else token_weight_T)
        if config.router_type == "dynamic":
            losses.append(_dynamic_layer_balance(logits_TR, config, attention_mask_T, weight_T)[None])
        else:
            losses.append(_layer_balance(logits_TR, config, token_group_T, weight_T))
    return _over_layers(losses, config)


def _layer_balance(
    logits_TR: torch.Tensor, config: UniMoeTextConfig, token_group_T: torch.Tensor | None, valid_T: torch.Tensor
) -> torch.Tensor:
    losses = []
    counted = config.num_experts_per_tok if config.router_aux_loss_counts == "all" else 1
    first_row = 0
    for index, group in enumerate(config.router_groups):
        size = len(group.experts) + config.num_null_experts
        logits_TC = logits_TR[:, first_row : first_row + size].float()
        first_row += size
        weight_T = valid_T if token_group_T is None else valid_T * (token_group_T == index)
        share_TC = _shares(logits_TC, config)
        chosen_TC = torch.zeros_like(share_TC).scatter_(1, share_TC.topk(counted).indices, 1.0)
        load_C = _weighted_mean(chosen_TC, weight_T) / counted
        losses.append(size * (load_C * _weighted_mean(share_TC, weight_T)).sum())
    return torch.stack(losses)


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


def modality_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    modality_ids_BS: torch.Tensor,
    attention_mask_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probability that tokens give to other experts than the `modality_experts` of their modality.

    The mean over layers and over all tokens that are not padding; tokens of a modality without experts of its own add
    nothing. As released: per token the mean distance of its probabilities from a row of ones (own experts) and zeros
    (others), summed over tokens and layers and divided by S. The two differ by factors and constants.

    Args: as those of `balance_terms`. Returns a float32 scalar.
    """
    modality_T = modality_ids_BS.reshape(-1)
    mask_T = None if attention_mask_BS is None else attention_mask_BS.reshape(-1)
    losses = []
    for logits_TR in router_logits:
        share_TC = _choosable_shares(logits_TR, config)
        own_MC = share_TC.new_zeros(len(MODALITIES), share_TC.shape[1])
        for name, experts in (config.modality_experts or {}).items():
            own_MC[MODALITIES.index(name), experts] = 1
        own_TC = own_MC[modality_T]
        counts_T = own_TC.any(dim=-1)
        if config.router_losses_as_released:
            distance_T = (share_TC - own_TC).abs().mean(dim=-1)
            losses.append((distance_T * counts_T).sum() / modality_ids_BS.shape[1])
        else:
            valid_T = _valid_tokens(logits_TR, mask_T)
            outside_T = (share_TC * (1 - own_TC)).sum(dim=-1)
            losses.append((outside_T * counts_T * valid_T).sum() / valid_T.sum().clamp(min=1))
    return _over_layers(losses, config)


def divergence_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    modality_ids_BS: torch.Tensor,
    attention_mask_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """How alike the modalities of a sample use the experts: 1 when they do so equally, less the more they differ.

    Per layer and sample: 1 minus the Kullback-Leibler divergence between the mean probabilities of two modalities, the
    mean over all ordered pairs that the sample holds. Then the mean over layers and samples that hold a pair; 0 when
    none does. As released: five pairs only, second softmax, divergence divided by C, sum over layers and samples.

    Args: as those of `balance_terms`. Returns a float32 scalar.
    """
    released = config.router_losses_as_released
    batch, length = modality_ids_BS.shape
    member_BSM = torch.nn.functional.one_hot(modality_ids_BS, len(MODALITIES)).float()
    if attention_mask_BS is not None and not released:
        member_BSM = member_BSM * attention_mask_BS[..., None]
    count_BM = member_BSM.sum(dim=1)
    held_BM = count_BM > 0
    pairs_BMM = held_BM[:, :, None] & held_BM[:, None, :] & _compared(released, modality_ids_BS.device)
    num_pairs_B = pairs_BMM.sum(dim=(1, 2))
    losses = []
    for logits_TR in router_logits:
        share_BSC = _choosable_shares(logits_TR, config).view(batch, length, -1)
        with maybe_autocast(logits_TR.device.type, enabled=False):
            mean_BMC = member_BSM.transpose(1, 2) @ share_BSC / count_BM.clamp(min=1)[..., None]
            if released:
                mean_BMC = mean_BMC.softmax(dim=-1)
            log_BMC = mean_BMC.clamp(min=torch.finfo(torch.float32).eps).log()
            # [b, i, j]: divergence of modality j's means from those of modality i.
            divergence_BMM = (mean_BMC * log_BMC).sum(dim=-1)[:, None, :] - log_BMC @ mean_BMC.transpose(1, 2)
        if released:
            divergence_BMM = divergence_BMM / mean_BMC.shape[-1]
        mean_B = (divergence_BMM * pairs_BMM).sum(dim=(1, 2)) / num_pairs_B.clamp(min=1)
        loss = ((1 - mean_B) * (num_pairs_B > 0)).sum()
        losses.append(loss if released else loss / (num_pairs_B > 0).sum().clamp(min=1))
    return _over_layers(losses, config)


def _compared(released: bool, device: torch.device) -> torch.Tensor:
    """Which ordered pairs of modalities are compared, bool [M, M]."""
    if not released:
        return ~torch.eye(len(MODALITIES), dtype=torch.bool, device=device)
    compared = torch.zeros(len(MODALITIES), len(MODALITIES), dtype=torch.bool, device=device)
    for first, second in _RELEASED_PAIRS:
        compared[MODALITIES.index(first), MODALITIES.index(second)] = True
    return compared


def router_z_loss(
    router_logits: tuple[torch.Tensor, ...],
    attention_mask_T: torch.Tensor | None = None,
    config: UniMoeTextConfig | None = None,
    token_group_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared log-sum-exp of a token's gate logits (ST-MoE, arXiv 2202.08906, eq. 5), averaged over layers.

    Args:
        config, token_group_T: with several groups, which rows are a token's own; the others do not concern it.
    """
    per_layer = []
    for logits_TR in router_logits:
        valid_T = _valid_tokens(logits_TR, attention_mask_T)
        own_TR = logits_TR.float()
        if token_group_T is not None and config is not None:
            sizes = [len(group.experts) + config.num_null_experts for group in config.router_groups]
            groups = torch.arange(len(sizes), device=own_TR.device)
            row_group_C = groups.repeat_interleave(torch.tensor(sizes, device=own_TR.device))
            foreign_TC = row_group_C != token_group_T[:, None]
            shared = own_TR.shape[1] - foreign_TC.shape[1]  # every token's rows
            own_TR = own_TR.masked_fill(torch.nn.functional.pad(foreign_TC, (0, shared)), float("-inf"))
        z_T = own_TR.logsumexp(dim=-1).square()
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


def _over_layers(losses: list[torch.Tensor], config: UniMoeTextConfig) -> torch.Tensor:
    stacked = torch.stack(losses)
    return stacked.sum(dim=0) if config.router_losses_as_released else stacked.mean(dim=0)


def _choosable_shares(logits_TR: torch.Tensor, config: UniMoeTextConfig) -> torch.Tensor:
    """Each token's probabilities of all that it can choose, [T, C]; with one group."""
    return _shares(logits_TR[:, : logits_TR.shape[1] - config.num_shared_experts].float(), config)


def _shares(logits_TC: torch.Tensor, config: UniMoeTextConfig) -> torch.Tensor:
    if config.router_scoring == "softmax":
        return logits_TC.softmax(dim=-1)
    scores_TC = logits_TC.sigmoid()
    return scores_TC / scores_TC.sum(dim=-1, keepdim=True)


def _weighted_mean(values_TC: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    return (values_TC * weight_T[:, None]).sum(dim=0) / _at_least_something(weight_T.sum())


def _at_least_something(total: torch.Tensor) -> torch.Tensor:
    """A divisor that is never 0; what it divides is 0 then."""
    return total.clamp(min=torch.finfo(torch.float32).tiny)


def _valid_tokens(logits_TR: torch.Tensor, attention_mask_T: torch.Tensor | None) -> torch.Tensor:
    if attention_mask_T is None:
        return torch.ones(len(logits_TR), device=logits_TR.device)
    return attention_mask_T.to(logits_TR.device, torch.float32)
