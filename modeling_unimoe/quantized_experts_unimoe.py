"""Experts one after the other: the reference, and how experts run whose weights are held in few bits.

Shape suffixes as in `modeling_unimoe_text.py`.
"""

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is one of torchao's tensors, ours included (`PackedInt4Tensor`)."""
    return hasattr(type(weight), "tensor_data_names")


def experts_one_by_one(
    experts: Any, x_TH: torch.Tensor, top_k_index_TK: torch.Tensor, top_k_weights_TK: torch.Tensor
) -> torch.Tensor:
    """What every expert makes of its tokens, weighted and summed, [T, H]. Index E means "no expert".

    Quantised weights are taken out of their fused tensor still quantised, an expert at a time and only if it has tokens.
    Their matrix product is that of their format: it brings back at most this one expert.
    """
    quantized = is_quantized(experts.gate_up_proj)
    # unbind, not [e]: indexing would make every backward build a full [E, 2I, H] gradient per expert.
    gate_up_E = experts.gate_up_proj if quantized else experts.gate_up_proj.unbind(0)
    down_E = experts.down_proj if quantized else experts.down_proj.unbind(0)

    def run_expert(expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        gate_NI, up_NI = F.linear(x_NH, gate_up_E[expert]).chunk(2, dim=-1)
        return F.linear(experts.act_fn(gate_NI) * up_NI, down_E[expert])

    chosen = (top_k_index_TK, top_k_weights_TK)
    return sum_of_experts(run_expert, experts.num_experts, x_TH, *chosen, skip_idle=quantized)


def sum_of_experts(
    run_expert: Callable[[int, torch.Tensor], torch.Tensor],
    num_experts: int,
    x_TH: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    skip_idle: bool,
) -> torch.Tensor:
    """`run_expert(expert, its tokens [N, H])` one after the other, weighted and summed, [T, H].

    Args:
        skip_idle: leave out experts without tokens; the others run on none, so that all are part of the graph.
    """
    y_TH = torch.zeros_like(x_TH)
    for expert, (token_N, choice_N) in enumerate(tokens_of_experts(top_k_index_TK, num_experts)):
        if skip_idle and not len(token_N):
            continue
        out_NH = run_expert(expert, x_TH[token_N]) * top_k_weights_TK[token_N, choice_N, None]
        y_TH.index_add_(0, token_N, out_NH.to(y_TH.dtype))
    return y_TH


def tokens_of_experts(index_TK: torch.Tensor, num_experts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For every expert its tokens and which of their choices it is, int64 [N] each, in the order of the tokens.

    On an accelerator the host waits once, for the numbers N of all experts together.
    """
    expert_S, place_S = index_TK.reshape(-1).sort(stable=True)
    experts = torch.arange(num_experts + 1, device=expert_S.device, dtype=expert_S.dtype)
    starts = torch.searchsorted(expert_S, experts).tolist()
    token_S, choice_S = place_S // index_TK.shape[1], place_S % index_TK.shape[1]
    return [(token_S[start:end], choice_S[start:end]) for start, end in pairwise(starts)]


def with_quantized_weights(experts_class: type[nn.Module]) -> type[nn.Module]:
    """Let experts run one by one while their weights are quantised: the other implementations multiply whole stacks."""
    chosen_forward: Callable[..., torch.Tensor] = experts_class.forward

    @wraps(chosen_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        run = experts_one_by_one if is_quantized(self.gate_up_proj) else chosen_forward
        return run(self, *args, **kwargs)

    experts_class.forward = forward  # type: ignore[method-assign]
    return experts_class


__all__ = ["experts_one_by_one", "is_quantized", "sum_of_experts", "with_quantized_weights"]
