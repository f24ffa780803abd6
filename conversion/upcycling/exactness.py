"""Whether a sparse model starts as the very function of the dense one, as far as that is known before it is run."""

import torch

from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from .sparsity import Sparsity


def is_exact(config: UniMoeTextConfig, sparsity: Sparsity, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the model must be its source up to rounding in float32; `dtype` is that of the stored weights."""
    return not (certain_changes(config, sparsity, dtype) or possible_changes(config))


def certain_changes(config: UniMoeTextConfig, sparsity: Sparsity, dtype: torch.dtype = torch.float32) -> list[str]:
    """What makes the model start as another function whatever its inputs are, for a reader; empty for exact ways.

    Args:
        config: of the sparse decoder.
    """
    changes = []
    if sparsity.noise:
        changes.append(f"noise of {sparsity.noise:g}")
    if round(config.moe_intermediate_size * sparsity.drop_ratio):
        changes.append(f"a drop ratio of {sparsity.drop_ratio:g}")
    if sparsity.granularity > 1 and sparsity.split == "slices":
        changes.append(f"experts that are slices, 1/{sparsity.granularity} of the dense FFN each")
    if config.num_null_experts and sparsity.router_init != "zeros":
        changes.append("null experts, which lose the weight that they win")
    if not config.norm_topk_prob and not _takes_everything(config):
        changes.append("norm_topk_prob = False, with which a token's weights do not sum to one")
    if loses_bits(sparsity, dtype):
        changes.append(
            f"a granularity of {sparsity.granularity} in {str(dtype).removeprefix('torch.')}, which cannot hold "
            f"{sparsity.granularity} times a weight (fp32 can, and all can with 2, 4, 8, ...)"
        )
    return changes


def possible_changes(config: UniMoeTextConfig) -> list[str]:
    """What changes the function for some inputs, so that only running the model tells."""
    changes = ["null experts, for tokens that choose them"] if config.num_null_experts else []
    if config.expert_capacity_factor is not None:
        changes.append("an expert capacity, for tokens that all their experts drop")
    return changes


def loses_bits(sparsity: Sparsity, dtype: torch.dtype) -> bool:
    """Whether virtual groups are scaled by a number whose products with weights have more digits than the dtype."""
    scale = sparsity.granularity if sparsity.split == "virtual-groups" else 1
    return dtype.itemsize < 4 and scale & (scale - 1) != 0


def _takes_everything(config: UniMoeTextConfig) -> bool:
    """Whether every token uses all rows that its softmax goes over, so that their weights sum to one as they are."""
    choices = {len(group.experts) + config.num_null_experts for group in config.router_groups}
    return config.router_scoring == "softmax" and choices == {config.num_experts_per_tok}


__all__ = ["certain_changes", "is_exact", "loses_bits", "possible_changes"]
