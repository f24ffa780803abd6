"""The dynamic-capacity router: how many experts a token uses depends on how sure the router is of it.

It is the router of DCMoE (Qwen2-VL) and UniMoE-Audio (Qwen2.5-VL, arXiv 2510.13344): top-p routing whose choices are
picked by SparseMixer-v2 (arXiv 2409.12136). What it yields is described in `routing_unimoe.py`. The gate has rows for
the routed, then the null, then the shared experts. A token

1. takes its best choices, null experts among them, until their probabilities reach `router_top_p`;
2. weighs each choice by its probability within the band of near-maximal logits among those still left, and divides
   by the sum: a choice without a near rival weighs 1 there, so k choices usually get 1 / k each;
3. shares its weight between all these and the shared experts by a softmax over the rows that are on: the choices
   together get their rows' part of it, each shared expert gets its own.

Padding chooses nothing. With a capacity, experts drop tokens between the first and the second half of step 2.

Shape suffixes: T tokens, H hidden size, R gate rows, C of them that can be chosen (routed, then null), K columns per
token: its choices, best first, then the F shared experts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils.generic import maybe_autocast

from .configuration_unimoe_text import UniMoeTextConfig
from .routing_unimoe import UniMoeRouter

# Keeps the division by the sum of a token's weights finite where no choice is left.
_EPSILON = 1e-6


class DynamicRouting(NamedTuple):
    """Everything that the router decides about T tokens.

    logits_TR: float32. num_choices_T: what `router_top_p` asks for, for padding too. rows_TK: rows of the best choices,
    best first; those after the first `num_choices_T` are not taken. chosen_TR and kept_TR: rows that are on, before and
    after experts drop tokens. weights_TR: mixing weights, float32; those of rows that are off mean nothing.
    """

    logits_TR: torch.Tensor
    num_choices_T: torch.Tensor
    rows_TK: torch.Tensor
    chosen_TR: torch.Tensor
    kept_TR: torch.Tensor
    weights_TR: torch.Tensor


class UniMoeDynamicRouter(UniMoeRouter):
    """The gate of one sparse layer with `router_type` "dynamic"."""

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__(config)
        self.top_p = config.router_top_p
        self.max_choices = config.max_choices_per_token
        self.near_max_band = config.router_near_max_band
        self.capacity_factor = config.expert_capacity_factor
        self.min_capacity = config.min_expert_capacity
        self.capacity_policy = config.capacity_policy

    def forward(
        self,
        x_TH: torch.Tensor,
        token_group_T: torch.Tensor | None = None,
        token_mask_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            x_TH: hidden states, any float dtype.
            token_group_T: not used, there is one group.
            token_mask_T: true for tokens, false for padding; None means that there is no padding.

        Returns:
            router_logits_TR (float32), weights_TK (dtype of x), index_TK (int64). K is the same for every batch.
        """
        routing = self.route(x_TH, token_mask_T)
        nobody = self.num_experts
        kept_TK = routing.kept_TR.gather(1, routing.rows_TK)
        index_TK = self.row_expert_R[routing.rows_TK].masked_fill(~kept_TK, nobody)
        weights_TK = routing.weights_TR.gather(1, routing.rows_TK).masked_fill(index_TK == nobody, 0)
        if self.num_shared_experts:
            shared = slice(-self.num_shared_experts, None)
            shared_TF = routing.weights_TR[:, shared].masked_fill(~routing.kept_TR[:, shared], 0)
            weights_TK = torch.cat((weights_TK, shared_TF), dim=-1)
            index_TK = torch.cat((index_TK, self.row_expert_R[shared].expand_as(shared_TF)), dim=-1)
        return routing.logits_TR, weights_TK.to(x_TH.dtype), index_TK

    def route(self, x_TH: torch.Tensor, token_mask_T: torch.Tensor | None = None) -> DynamicRouting:
        """The whole decision; `forward` says it in the words of the experts' backends."""
        with maybe_autocast(x_TH.device.type, enabled=False):
            logits_TR = F.linear(self._jittered(x_TH.float()), self.weight.float())
        logits_TC = logits_TR[:, : logits_TR.shape[1] - self.num_shared_experts]
        num_choices_T = count_choices(logits_TC, self.top_p, self.max_choices)
        rows_TK, pick_weights_TK = pick_rows(logits_TC, self.max_choices, self.near_max_band, sample=self.draws)
        taken_TK = _taken_columns(rows_TK, num_choices_T)
        taken_TC = _at_rows(rows_TK, taken_TK, logits_TC)
        weights_TC = _at_rows(rows_TK, pick_weights_TK * taken_TK, logits_TC)
        if token_mask_T is not None:
            taken_TC = taken_TC & token_mask_T.bool()[:, None]
        chosen_TR = F.pad(taken_TC, (0, self.num_shared_experts), value=True)
        kept_TR = self._drop(chosen_TR, logits_TC)
        if self.capacity_factor is not None:
            weights_TC = weights_TC * kept_TR[:, : weights_TC.shape[1]]
        weights_TC = weights_TC / (weights_TC.sum(dim=-1, keepdim=True) + _EPSILON)
        weights_TR = self._share_with_shared_experts(weights_TC, logits_TR, kept_TR)
        return DynamicRouting(logits_TR, num_choices_T, rows_TK, chosen_TR, kept_TR, weights_TR)

    def _drop(self, chosen_TR: torch.Tensor, logits_TC: torch.Tensor) -> torch.Tensor:
        """The rows that are still on once every expert has dropped what exceeds its capacity."""
        if self.capacity_factor is None:
            return chosen_TR
        num_tokens, num_choosable = logits_TC.shape
        capacity = max(math.ceil(num_tokens / num_choosable * self.capacity_factor), self.min_capacity)
        if self.capacity_policy == "position":
            return chosen_TR & (chosen_TR.cumsum(dim=0) <= capacity)
        chosen_TC = chosen_TR[:, :num_choosable]
        candidates_TC = logits_TC.masked_fill(~chosen_TC, float("-inf"))
        best = candidates_TC.topk(min(capacity, num_tokens), dim=0).indices
        kept_TC = torch.zeros_like(chosen_TC).scatter(0, best, True) & chosen_TC
        return torch.cat((kept_TC, chosen_TR[:, num_choosable:]), dim=-1)

    def _share_with_shared_experts(
        self, weights_TC: torch.Tensor, logits_TR: torch.Tensor, kept_TR: torch.Tensor
    ) -> torch.Tensor:
        if not self.num_shared_experts:
            return weights_TC
        # Not -inf: a token may have no row on at all, and a softmax over nothing would spread NaN through gradients.
        off = torch.finfo(logits_TR.dtype).min
        global_TR = logits_TR.masked_fill(~kept_TR, off).softmax(dim=-1)
        global_TC, shared_TF = global_TR.split([weights_TC.shape[1], self.num_shared_experts], dim=-1)
        return torch.cat((weights_TC * global_TC.sum(dim=-1, keepdim=True), shared_TF), dim=-1)


def count_choices(logits_TC: torch.Tensor, top_p: float, max_choices: int) -> torch.Tensor:
    """How many of its best rows each token takes, int64 [T]: enough for a sum of probabilities of top_p; 0 takes all.

    Args:
        max_choices: at most, and what "all" means.
    """
    if not top_p:
        return torch.full(logits_TC.shape[:1], max_choices, device=logits_TC.device)
    sums_TC = logits_TC.softmax(dim=-1).sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return ((sums_TC < top_p).sum(dim=-1) + 1).clamp(max=max_choices)


def pick_rows(
    logits_TC: torch.Tensor, num_picks: int, near_max_band: float, sample: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick rows one after another, each time among those still left.

    Args:
        logits_TC: float32.
        near_max_band: rows compete with the best one left if they lie below it by at most this share of the larger of
            both absolute values.
        sample: draw the pick among these instead of taking the best.

    Returns:
        rows_TK (int64) and pick_weights_TK (float32, not normalised), with K = num_picks.
    """
    rows, weights = [], []
    left_TC = logits_TC
    for _ in range(num_picks):
        rivals_TC = _near_max(left_TC, near_max_band)
        probabilities_TC = rivals_TC.softmax(dim=-1)
        if sample:
            row_T1 = (rivals_TC - torch.empty_like(rivals_TC).exponential_().log()).argmax(dim=-1, keepdim=True)
            weight_T1 = _sampled_weight(probabilities_TC, row_T1)
        else:
            row_T1 = rivals_TC.argmax(dim=-1, keepdim=True)
            weight_T1 = probabilities_TC.gather(1, row_T1)
        rows.append(row_T1)
        weights.append(weight_T1)
        left_TC = left_TC.scatter(1, row_T1, float("-inf"))
    return torch.cat(rows, dim=-1), torch.cat(weights, dim=-1)


def chosen_rows(
    logits_TR: torch.Tensor, config: UniMoeTextConfig, token_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """The choices that these gate logits lead to, before any expert drops a token: bool [T, C].

    Where picks are sampled it says what the best picks would have been; the two differ within the band only.
    """
    logits_TC = logits_TR[:, : logits_TR.shape[1] - config.num_shared_experts].detach().float()
    rows_TK, _ = pick_rows(logits_TC, config.max_choices_per_token, config.router_near_max_band)
    num_choices_T = count_choices(logits_TC, config.router_top_p, config.max_choices_per_token)
    taken_TC = _at_rows(rows_TK, _taken_columns(rows_TK, num_choices_T), logits_TC)
    return taken_TC if token_mask_T is None else taken_TC & token_mask_T.bool()[:, None]


def _near_max(left_TC: torch.Tensor, band: float) -> torch.Tensor:
    """The logits, -inf outside the band below the best one."""
    with torch.no_grad():
        best_T1 = left_TC.amax(dim=-1, keepdim=True)
        # Rows that are gone make this NaN; they are -inf already.
        far_TC = (best_T1 - left_TC) / torch.maximum(left_TC.abs(), best_T1.abs()) > band
    return left_TC.masked_fill(far_TC, float("-inf"))


def _sampled_weight(probabilities_TC: torch.Tensor, row_T1: torch.Tensor) -> torch.Tensor:
    """Weight of a sampled pick: the gradient is that of its probability, as if nothing had been scaled.

    A pick that is not the best counts a third three times out of four: the nodes and weights of Heun's third-order method
    (SparseMixer-v2, arXiv 2409.12136).
    """
    weight_T1 = probabilities_TC.gather(1, row_T1)
    with torch.no_grad():
        is_best_T1 = row_T1 == probabilities_TC.argmax(dim=-1, keepdim=True)
        whole_T1 = is_best_T1 | (torch.rand_like(weight_T1) < 0.25)
        scaled_T1 = torch.where(whole_T1, weight_T1, weight_T1 / 3)
    return weight_T1 + (scaled_T1 - weight_T1.detach())


def _taken_columns(rows_TK: torch.Tensor, num_choices_T: torch.Tensor) -> torch.Tensor:
    """Bool [T, K]: a token takes its first `num_choices_T` columns."""
    return torch.arange(rows_TK.shape[1], device=rows_TK.device) < num_choices_T[:, None]


def _at_rows(rows_TK: torch.Tensor, values_TK: torch.Tensor, logits_TC: torch.Tensor) -> torch.Tensor:
    """The values at their rows, [T, C] as the logits; 0 or false elsewhere."""
    return torch.zeros_like(logits_TC, dtype=values_TK.dtype).scatter(1, rows_TK, values_TK)
