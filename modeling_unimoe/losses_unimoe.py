"""What the routers add to the training loss.

With `router_losses_as_released` three of them follow the code of Uni-MoE's 8-expert variant to the letter. Then layers
and samples are summed, so that weights mean something else for every batch size and depth; padding counts, as text; and
the mean gates that the divergence compares go through a second softmax, which leaves little of their difference.

Shape suffixes: B batch, S sequence, T = B * S tokens, L layers, R gate rows of one layer, C those that can be chosen (per
group its experts, then null experts), K experts per token, E experts, G groups, M modalities.
"""

from typing import NamedTuple

import torch

from .balance_loss_unimoe import balance_losses_and_even, counted_layers, layer_choices
from .configuration_unimoe_text import LOSS_COEFFICIENTS, UniMoeTextConfig
from .gate_rows_unimoe import StepTotals, group_sizes, valid_tokens
from .modality_losses_unimoe import divergence_loss, modality_loss, modality_pairs


class BalanceTerms(NamedTuple):
    """Float32: the scalar `weighted` is what joins the cross entropy, `losses` its terms, unweighted, by their names.

    aux_loss_G: the groups' parts of "aux_loss".
    even: the same as `losses`, as they would be if the experts were used evenly: the load-balancing loss with even choices
        and probabilities, the others with gates that prefer nothing (all logits 0). No gradients.
    weighted_even: what would join the cross entropy then.
    """

    weighted: torch.Tensor
    losses: dict[str, torch.Tensor]
    aux_loss_G: torch.Tensor
    even: dict[str, torch.Tensor]
    weighted_even: torch.Tensor


@torch.no_grad()
def step_totals(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    modality_ids: torch.Tensor,
    token_groups: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> StepTotals:
    """The sums of one batch; arguments as those of `balance_terms`."""
    mask_BS, mask_T, groups_T = _per_token(attention_mask, token_groups)
    layers = [layer_choices(*layer, config) for layer in counted_layers(router_logits, config, groups_T, mask_T, None)]
    chosen_LC, tokens_LC = (torch.stack(parts) for parts in zip(*layers, strict=True))
    _, pairs_BMM = modality_pairs(modality_ids, mask_BS, released=False)
    samples = (pairs_BMM.sum(dim=(1, 2)) > 0).sum().float()
    return StepTotals(chosen_LC, tokens_LC, valid_tokens(router_logits[0], mask_T).sum(), samples)


def balance_terms(
    router_logits: tuple[torch.Tensor, ...],
    config: UniMoeTextConfig,
    modality_ids: torch.Tensor,
    token_groups: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    step: StepTotals | None = None,
) -> BalanceTerms:
    """What the routers add to the training loss; the names are those in `LOSS_COEFFICIENTS`.

    Losses that look at modalities are there only when their coefficient is not 0.

    Args:
        router_logits: one [B * S, R] tensor per sparse layer.
        modality_ids: modality id of every position, [B, S].
        token_groups: routing group of every position, [B, S]; None with one group.
        attention_mask: [B, S], 1 for tokens, 0 for padding; None, or another shape, means no padding.
        step: where these tokens are part of an optimizer step; the losses are then their parts of the step's losses.
            Not for losses as released.
    """
    mask_BS, mask_T, groups_T = _per_token(attention_mask, token_groups)
    aux_loss_G, aux_even_G = balance_losses_and_even(router_logits, config, groups_T, mask_T, step=step)

    def others(logits: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        losses = {"z_loss": router_z_loss(logits, mask_T, config, groups_T, step)}
        if config.router_modality_loss_coef:
            losses["modality_loss"] = modality_loss(logits, config, modality_ids, mask_BS, step)
        if config.router_divergence_loss_coef:
            losses["divergence_loss"] = divergence_loss(logits, config, modality_ids, mask_BS, step)
        return losses

    def weighted(aux_G: torch.Tensor, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        # Numbers, not a tensor of them: copying it to the device would wait for all that runs there.
        aux = torch.stack([c * loss for c, loss in zip(config.aux_loss_coefs, aux_G.unbind(), strict=True)]).sum()
        return torch.stack([aux, *(getattr(config, LOSS_COEFFICIENTS[n]) * loss for n, loss in losses.items())]).sum()

    losses = others(router_logits)
    with torch.no_grad():
        even = others(tuple(torch.zeros_like(logits) for logits in router_logits))
    return BalanceTerms(
        weighted(aux_loss_G, losses),
        {"aux_loss": aux_loss_G.sum(), **losses},
        aux_loss_G,
        {"aux_loss": aux_even_G.sum(), **even},
        weighted(aux_even_G, even),
    )


def router_z_loss(
    router_logits: tuple[torch.Tensor, ...],
    attention_mask_T: torch.Tensor | None = None,
    config: UniMoeTextConfig | None = None,
    token_group_T: torch.Tensor | None = None,
    step: StepTotals | None = None,
) -> torch.Tensor:
    """Mean squared log-sum-exp of a token's gate logits (ST-MoE, arXiv 2202.08906, eq. 5), averaged over layers.

    Args:
        config, token_group_T: with several groups, which rows are a token's own; the others do not concern it.
    """
    per_layer = []
    for logits_TR in router_logits:
        valid_T = valid_tokens(logits_TR, attention_mask_T)
        own_TR = logits_TR.float()
        if token_group_T is not None and config is not None:
            own_TR = _own_rows(own_TR, token_group_T, config)
        z_T = own_TR.logsumexp(dim=-1).square()
        tokens = valid_T.sum() if step is None else step.tokens
        per_layer.append((z_T * valid_T).sum() / tokens.clamp(min=1))
    return torch.stack(per_layer).mean()


def _per_token(
    attention_mask: torch.Tensor | None, token_groups: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The mask as [B, S] and [T], None where it masks no padding, and the groups as [T]."""
    mask_BS = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask
    mask_T = None if mask_BS is None else mask_BS.reshape(-1)
    return mask_BS, mask_T, None if token_groups is None else token_groups.reshape(-1)


def _own_rows(logits_TR: torch.Tensor, token_group_T: torch.Tensor, config: UniMoeTextConfig) -> torch.Tensor:
    """The logits, -inf on the rows of other groups; rows of shared experts are every token's."""
    foreign = [(token_group_T != i)[:, None].expand(-1, size) for i, size in enumerate(group_sizes(config))]
    foreign_TC = torch.cat(foreign, dim=1)
    shared = logits_TR.shape[1] - foreign_TC.shape[1]
    return logits_TR.masked_fill(torch.nn.functional.pad(foreign_TC, (0, shared)), float("-inf"))
