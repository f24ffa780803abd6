"""Losses that lead modalities to experts: to their own, and apart from each other. Of Uni-MoE's 8-expert code only.

Shape suffixes: B batch, S sequence, T = B * S tokens, R gate rows of one layer, C those that can be chosen, M modalities.
"""

import torch
from transformers.utils.generic import maybe_autocast

from .configuration_unimoe_text import MODALITIES, UniMoeTextConfig
from .gate_rows_unimoe import StepTotals, choosable_shares, over_layers, valid_tokens

# The pairs that the released code compares: the second one's use of experts is measured by that of the first.
_RELEASED_PAIRS = (("image", "speech"), ("image", "text"), ("speech", "text"), ("speech", "video"), ("video", "text"))


def modality_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    modality_ids_BS: torch.Tensor,
    attention_mask_BS: torch.Tensor | None = None,
    step: StepTotals | None = None,
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
        share_TC = choosable_shares(logits_TR, config)
        own_MC = share_TC.new_zeros(len(MODALITIES), share_TC.shape[1])
        for name, experts in (config.modality_experts or {}).items():
            for expert in experts:  # one by one: a list would be copied to the device, which waits
                own_MC[MODALITIES.index(name), expert] = 1
        own_TC = own_MC[modality_T]
        counts_T = own_TC.any(dim=-1)
        if config.router_losses_as_released:
            distance_T = (share_TC - own_TC).abs().mean(dim=-1)
            losses.append((distance_T * counts_T).sum() / modality_ids_BS.shape[1])
        else:
            valid_T = valid_tokens(logits_TR, mask_T)
            outside_T = (share_TC * (1 - own_TC)).sum(dim=-1)
            tokens = valid_T.sum() if step is None else step.tokens
            losses.append((outside_T * counts_T * valid_T).sum() / tokens.clamp(min=1))
    return over_layers(losses, config)


def divergence_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    modality_ids_BS: torch.Tensor,
    attention_mask_BS: torch.Tensor | None = None,
    step: StepTotals | None = None,
) -> torch.Tensor:
    """How alike the modalities of a sample use the experts: 1 when they do so equally, less the more they differ.

    Per layer and sample: 1 minus the Kullback-Leibler divergence between the mean probabilities of two modalities, the
    mean over all ordered pairs that the sample holds. Then the mean over layers and samples that hold a pair; 0 when
    none does. As released: five pairs only, second softmax, divergence divided by C, sum over layers and samples.

    Args: as those of `balance_terms`. Returns a float32 scalar.
    """
    released = config.router_losses_as_released
    batch, length = modality_ids_BS.shape
    member_BSM, pairs_BMM = modality_pairs(modality_ids_BS, None if released else attention_mask_BS, released)
    count_BM = member_BSM.sum(dim=1)
    num_pairs_B = pairs_BMM.sum(dim=(1, 2))
    samples = (num_pairs_B > 0).sum() if step is None else step.samples
    losses = []
    for logits_TR in router_logits:
        share_BSC = choosable_shares(logits_TR, config).view(batch, length, -1)
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
        losses.append(loss if released else loss / samples.clamp(min=1))
    return over_layers(losses, config)


def modality_pairs(
    modality_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor | None, released: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which modality each token has, float32 [B, S, M], 0 for padding; and the pairs to compare, bool [B, M, M]."""
    member_BSM = torch.nn.functional.one_hot(modality_ids_BS, len(MODALITIES)).float()
    if attention_mask_BS is not None:
        member_BSM = member_BSM * attention_mask_BS[..., None]
    held_BM = member_BSM.sum(dim=1) > 0
    return member_BSM, held_BM[:, :, None] & held_BM[:, None, :] & _compared(released, modality_ids_BS.device)


def _compared(released: bool, device: torch.device) -> torch.Tensor:
    """Which ordered pairs of modalities are compared, bool [M, M]."""
    if not released:
        return ~torch.eye(len(MODALITIES), dtype=torch.bool, device=device)
    compared = torch.zeros(len(MODALITIES), len(MODALITIES), dtype=torch.bool, device=device)
    for first, second in _RELEASED_PAIRS:
        compared[MODALITIES.index(first), MODALITIES.index(second)] = True
    return compared
