"""Which experts a token uses, and with what weight.

Every router yields the same three tensors, and every experts backend consumes them:

    router_logits_TR    one logit per token and gate row, before any masking
    top_k_weights_TK    mixing weights, in the dtype of the hidden states
    top_k_index_TK      ids of the experts in the layer's fused weights, int64; E means "no expert", with weight 0

Shape suffixes: T tokens, H hidden size, R gate rows, K experts per token, E experts, G groups, F shared experts.

A group is a subset of the experts that the tokens of some modalities may choose from. The gate holds one row per
(group, expert) pair, groups one after the other, so that one matrix product scores every group at once; a token then
sees only the rows of its own group. With a single group of all experts R equals E and this is the plain top-k router
of Uni-MoE (arXiv 2405.11273, section 3.3); with overlapping groups it is MoIIE (arXiv 2508.09779, section 3.2).

Two kinds of rows may join, with any router. Null experts, in every group after its experts, are choices that compute
nothing: the token's index is E, and the share of weight that they won is lost. Shared experts have the last rows; every
token uses them, so they are the last F of its K columns, with ids from E + 1 on. Weights are normalised over all of a
token's columns, null ones included.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_unimoe_text import UniMoeTextConfig


class UniMoeRouter(nn.Module):
    """The gate of one sparse layer.

    Attributes:
        choice_bias_C: float32 biases of the rows that can be chosen; absent without `router_bias_update_rate`.
        load_C: how often training tokens chose each of these rows since the last update; None when none did.
    """

    row_group_R: torch.Tensor
    row_expert_R: torch.Tensor
    choice_bias_C: torch.Tensor

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scoring = config.router_scoring
        self.normalize = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.jitter_reaches_experts = config.router_jitter_reaches_experts
        self.pick = config.router_pick
        self.in_float32 = config.router_in_float32
        self.groups = config.router_groups
        self.num_experts = config.num_experts
        self.num_null_experts = config.num_null_experts
        self.num_shared_experts = config.num_shared_experts
        num_rows = config.num_gate_rows
        self.weight = nn.Parameter(torch.empty(num_rows, config.hidden_size))
        self.register_buffer("row_group_R", torch.empty(num_rows, dtype=torch.long), persistent=False)
        self.register_buffer("row_expert_R", torch.empty(num_rows, dtype=torch.long), persistent=False)
        self.reset_row_tables()
        self.bias_update_rate = config.router_bias_update_rate
        # No buffer: parallel wrappers would overwrite the counts of other ranks with those of the first.
        self.load_C: torch.Tensor | None = None
        if self.bias_update_rate:
            num_choosable = num_rows - config.num_shared_experts
            self.register_buffer("choice_bias_C", torch.zeros(num_choosable, dtype=torch.float32))

    def reset_row_tables(self) -> None:
        """Fill the two lookup tables from the groups; they are not saved, so loading calls this again.

        Shared rows belong to group -1, which is every token's.
        """
        nobody = self.num_experts
        groups, experts = [], []
        for index, group in enumerate(self.groups):
            experts += [*group.experts, *[nobody] * self.num_null_experts]
            groups += [index] * (len(group.experts) + self.num_null_experts)
        experts += range(nobody + 1, nobody + 1 + self.num_shared_experts)
        groups += [-1] * self.num_shared_experts
        init.copy_(self.row_group_R, torch.tensor(groups))
        init.copy_(self.row_expert_R, torch.tensor(experts))

    def forward(
        self,
        x_TH: torch.Tensor,
        token_group_T: torch.Tensor | None = None,
        token_mask_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            x_TH: hidden states, any float dtype.
            token_group_T: index of each token's group, int64; may be None when there is one group.
            token_mask_T: true for tokens, false for padding, which is routed but is no load; None means no padding.

        Returns:
            router_logits_TR (dtype of x, or float32 with `router_in_float32`; never with the noise of draws),
            top_k_weights_TK (dtype of x), top_k_index_TK (int64).
        """
        router_logits_TR = self._logits(x_TH)
        own_logits_TR = self.own_rows(router_logits_TR, token_group_T)
        scores_TR = own_logits_TR.softmax(dim=-1) if self.scoring == "softmax" else own_logits_TR.sigmoid()
        first_shared = scores_TR.shape[1] - self.num_shared_experts
        row_TK = self._choices(own_logits_TR[:, :first_shared], scores_TR[:, :first_shared])
        if self.bias_update_rate and self.training:
            self._count(row_TK, token_mask_T)
        scores_TK = scores_TR.gather(1, row_TK)
        index_TK = self.row_expert_R[row_TK]
        if self.num_shared_experts:
            scores_TK = torch.cat((scores_TK, scores_TR[:, first_shared:]), dim=-1)
            shared_F = self.row_expert_R[first_shared:]
            index_TK = torch.cat((index_TK, shared_F.expand(len(index_TK), -1)), dim=-1)
        if self.normalize and scores_TK.shape[1] == 1:
            scores_TK = 0 * scores_TK + 1  # x / x, whose gradient would be rounding errors in place of 0
        elif self.normalize:
            scores_TK = scores_TK / scores_TK.sum(dim=-1, keepdim=True)
        if self.num_null_experts:
            scores_TK = scores_TK.masked_fill(index_TK == self.num_experts, 0)
        return router_logits_TR, scores_TK.to(x_TH.dtype), index_TK

    @property
    def draws(self) -> bool:
        """Whether choices are drawn now, and not simply the best ones taken."""
        return self.pick == "sample_always" or (self.pick == "sample" and self.training)

    def choice_noise(self, logits_TC: torch.Tensor) -> torch.Tensor:
        """Standard Gumbel noise, float32 [T, C]: added to logits, it makes their maximum a draw from their softmax."""
        return -torch.empty_like(logits_TC).exponential_().log()

    def _choices(self, logits_TC: torch.Tensor, scores_TC: torch.Tensor) -> torch.Tensor:
        """Rows that each token chooses, [T, K], the best one first; the others may be drawn."""
        if not self.draws or self.top_k == 1:
            return self._choice_scores(logits_TC, scores_TC).topk(self.top_k, dim=-1).indices
        logits_TC = logits_TC.detach()
        first_T1 = logits_TC.argmax(dim=-1, keepdim=True)
        noisy_TC = (logits_TC + self.choice_noise(logits_TC)).scatter(1, first_T1, float("-inf"))
        return torch.cat((first_T1, noisy_TC.topk(self.top_k - 1, dim=-1).indices), dim=-1)

    def _choice_scores(self, logits_TC: torch.Tensor, scores_TC: torch.Tensor) -> torch.Tensor:
        """What the choice goes by, without gradient."""
        scores_TC = scores_TC.detach()
        if self.bias_update_rate:
            scores_TC = scores_TC + self.choice_bias_C
        if len(self.groups) > 1:
            # A score of 0, or a biased one, would let rows of other groups in.
            scores_TC = scores_TC.masked_fill(logits_TC == float("-inf"), float("-inf"))
        return scores_TC

    @torch.no_grad()
    def _count(self, row_TK: torch.Tensor, token_mask_T: torch.Tensor | None) -> None:
        counted_TK = torch.ones_like(row_TK, dtype=torch.float32)
        if token_mask_T is not None:
            counted_TK = counted_TK * token_mask_T[:, None]
        load_C = torch.zeros_like(self.choice_bias_C, dtype=torch.float32)
        load_C.index_add_(0, row_TK.flatten(), counted_TK.flatten())
        self.load_C = load_C if self.load_C is None else self.load_C + load_C

    @torch.no_grad()
    def update_choice_bias(self, load_C: torch.Tensor) -> None:
        """Move every bias by the rate: up where its row got less than its group's mean load, down where more.

        Args:
            load_C: how often each row was chosen, by the tokens of all ranks and all batches of the step.
        """
        if self.choice_bias_C.dtype != torch.float32:  # the whole model was cast; the small steps would vanish
            self.choice_bias_C = self.choice_bias_C.float()
        rows = [len(group.experts) + self.num_null_experts for group in self.groups]
        error_C = torch.cat([own_C.mean() - own_C for own_C in load_C.split(rows)])
        self.choice_bias_C += self.bias_update_rate * error_C.sign()

    def _logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        if not self.in_float32:
            return F.linear(self._jittered(x_TH), self.weight)
        with maybe_autocast(x_TH.device.type, enabled=False):
            return F.linear(self._jittered(x_TH.float()), self.weight.float())

    def _jittered(self, x_TH: torch.Tensor) -> torch.Tensor:
        return x_TH if self.jitter_reaches_experts else self.jittered(x_TH)

    def jittered(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The states with their noise, in training."""
        if not self.training or self.jitter_noise == 0:
            return x_TH
        return x_TH * torch.empty_like(x_TH).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)

    def own_rows(self, logits_TR: torch.Tensor, token_group_T: torch.Tensor | None) -> torch.Tensor:
        """The logits in float32, -inf on the rows of other groups."""
        logits_TR = logits_TR.float()
        if len(self.groups) == 1:
            return logits_TR
        foreign_TR = (self.row_group_R != token_group_T[:, None]) & (self.row_group_R >= 0)
        return logits_TR.masked_fill(foreign_TR, float("-inf"))
