"""Experts of linear layers, each with a matrix of its own: how bitsandbytes, which knows nothing else, takes them.

A model whose configuration asks for bitsandbytes is built with these in the place of fused experts. On loading, every fused
tensor is cut into its experts, and each of them is quantised by itself.

Shape suffixes as in `modeling_unimoe_text.py`.
"""

from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .modeling_unimoe_text import UniMoeExperts, UniMoeTextModel
from .quantized_experts_unimoe import sum_of_experts

_TENSORS = ("gate_up_proj", "down_proj")


class UniMoeLinearExperts(nn.Module):
    """What `UniMoeExperts` computes, from `gate_up_proj.{e}.weight` [2I, H] and `down_proj.{e}.weight` [H, I]."""

    gate_up_proj: nn.ModuleList
    down_proj: nn.ModuleList

    def __init__(self, fused: UniMoeExperts) -> None:
        super().__init__()
        self.num_experts, self.act_fn = fused.num_experts, fused.act_fn
        for name in _TENSORS:
            matrices = getattr(fused, name)
            layers = [nn.Linear(one.shape[1], one.shape[0], bias=False, device="meta") for one in matrices]
            for layer, matrix in zip(layers, matrices, strict=True):
                layer.weight = nn.Parameter(matrix.detach(), requires_grad=matrix.requires_grad)
            self.add_module(name, nn.ModuleList(layers))

    def forward(
        self, x_TH: torch.Tensor, top_k_index_TK: torch.Tensor, top_k_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """One expert after the other, those without tokens left out. Index E means "no expert"."""
        chosen = (top_k_index_TK, top_k_weights_TK)
        return sum_of_experts(self._run_expert, self.num_experts, x_TH, *chosen, skip_idle=True)

    def _run_expert(self, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
        gate_NI, up_NI = self.gate_up_proj[expert](x_NH).chunk(2, dim=-1)
        return self.down_proj[expert](self.act_fn(gate_NI) * up_NI)


class UniMoeTextModelOfLinearExperts(UniMoeTextModel):
    """A decoder with such experts; the name is what transformers finds the cutting of fused tensors by."""


def wants_linear_experts(config: Any) -> bool:
    """Whether a model of this configuration is, or is being, held in few bits by bitsandbytes."""
    chosen = getattr(config, "quantization_config", None)
    method = chosen.get("quant_method") if isinstance(chosen, dict) else getattr(chosen, "quant_method", None)
    return method == "bitsandbytes"


def use_linear_experts(decoder: UniMoeTextModel) -> None:
    """Replace the fused experts of a decoder."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, UniMoeExperts):
            decoder.set_submodule(name, UniMoeLinearExperts(module))
    decoder.__class__ = UniMoeTextModelOfLinearExperts


class CutIntoExperts(ConversionOps):
    """A fused tensor [E, ...] becomes one tensor for each expert; the target's name is that of expert 0."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        [fused], [first] = input_dict.values(), target_patterns
        matrices = fused[0] if isinstance(fused, list) else fused
        return {first.replace(".0.", f".{expert}."): matrix for expert, matrix in enumerate(matrices)}


register_checkpoint_conversion_mapping(
    UniMoeTextModelOfLinearExperts.__name__,
    [WeightConverter(rf"experts.{name}$", f"experts.{name}.0.weight", [CutIntoExperts()]) for name in _TENSORS],
    overwrite=True,
)

__all__ = ["UniMoeLinearExperts", "UniMoeTextModelOfLinearExperts", "use_linear_experts", "wants_linear_experts"]
