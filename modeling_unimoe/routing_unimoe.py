"""Which experts a token uses, and with what weight.

Every router yields the same three tensors, and every experts backend consumes them:

    router_logits_TR    one logit per token and gate row, before any masking
    top_k_weights_TK    mixing weights, in the dtype of the hidden states
    top_k_index_TK      ids of the experts in the layer's fused weights, int64

Shape suffixes: T tokens, H hidden size, R gate rows, K experts per token, E experts, G groups.

A group is a subset of the experts that the tokens of some modalities may choose from. The gate holds one row per
(group, expert) pair, groups one after the other, so that one matrix product scores every group at once; a token then
sees only the rows of its own group. With a single group of all experts R equals E and this is the plain top-k router
of Uni-MoE (arXiv 2405.11273, section 3.3); with overlapping groups it is MoIIE (arXiv 2508.09779, section 3.2).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_unimoe_text import UniMoeTextConfig


class UniMoeRouter(nn.Module):
    """The gate of one sparse layer."""

    row_group_R: torch.Tensor
    row_expert_R: torch.Tensor

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scoring = config.router_scoring
        self.normalize = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.groups = config.router_groups
        num_rows = sum(len(group.experts) for group in self.groups)
        self.weight = nn.Parameter(torch.empty(num_rows, config.hidden_size))
        self.register_buffer("row_group_R", torch.empty(num_rows, dtype=torch.long), persistent=False)
        self.register_buffer("row_expert_R", torch.empty(num_rows, dtype=torch.long), persistent=False)
        self.reset_row_tables()

    def reset_row_tables(self) -> None:
        """Fill the two lookup tables from the groups; they are not saved, so loading calls this again."""
        groups = [index for index, group in enumerate(self.groups) for _ in group.experts]
        experts = [expert for group in self.groups for expert in group.experts]
        init.copy_(self.row_group_R, torch.tensor(groups))
        init.copy_(self.row_expert_R, torch.tensor(experts))

    def forward(
        self, x_TH: torch.Tensor, token_group_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            x_TH: hidden states, any float dtype.
            token_group_T: index of each token's group, int64; may be None when there is one group.

        Returns:
            router_logits_TR (dtype of x), top_k_weights_TK (dtype of x), top_k_index_TK (int64).
        """
        if self.training and self.jitter_noise > 0:
            x_TH = x_TH * torch.empty_like(x_TH).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        router_logits_TR = F.linear(x_TH, self.weight)
        scores_TR = self._scores(router_logits_TR, token_group_T)
        top_scores_TK, row_TK = scores_TR.topk(self.top_k, dim=-1)
        if self.normalize:
            top_scores_TK = top_scores_TK / top_scores_TK.sum(dim=-1, keepdim=True)
        return router_logits_TR, top_scores_TK.to(x_TH.dtype), self.row_expert_R[row_TK]

    def _scores(self, logits_TR: torch.Tensor, token_group_T: torch.Tensor | None) -> torch.Tensor:
        """Scores in float32, zero on the rows of other groups."""
        logits_TR = logits_TR.float()
        if len(self.groups) > 1:
            foreign_TR = self.row_group_R[None, :] != token_group_T[:, None]
            logits_TR = logits_TR.masked_fill(foreign_TR, float("-inf"))
        return logits_TR.softmax(dim=-1) if self.scoring == "softmax" else logits_TR.sigmoid()
