"""What an expert starts as: ways to make it of the dense FFN that have been published.

    copy              the FFN itself (Sparse Upcycling, arXiv 2212.05055, section 3)
    noise             Gaussian noise on the copies, which starts them apart from each other (an ablation there)
    drop_ratio r      a random share r of the FFN's inner dimensions starts anew in every expert, drawn from a normal
                      distribution with the mean and deviation of the weights it replaces (Drop-Upcycling,
                      arXiv 2502.19261, section 3)
    granularity G     each expert is one of G consecutive parts of the FFN:
      virtual-groups  the G parts of a copy share their gate row, so that a token that chooses k = m G experts gets m whole
                      copies, and down_proj is G times as large, because the weights of the k experts sum to one: the
                      model starts as the same function (arXiv 2410.07524, its virtual groups and weight scaling)
      slices          parts as they are, gate rows each their own, shared experts are the first part (DCMoE's `moe_copy`
                      "all"): the model starts as a share of the function

Shared experts are whole copies without noise or new dimensions; weights sum to one over shared and routed ones.
"""

import math
from collections.abc import Iterable

import torch

from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from .exactness import loses_bits
from .sparsity import Sparsity

# Draws for one expert differ in purpose, so that e.g. the noise stays when the drop ratio changes.
_DIMENSIONS, _NOISE, _NEW = 0, 1, 4
# Values that are worked on at once, so that memory holds a weight matrix and its copy, and little beside them.
_BLOCK = 1 << 18
# Root mean square of the relative error of rounding, in units of the dtype's epsilon, for evenly spread exponents.
_ROUNDING = 0.21
_PROJECTION_OFFSET = {"gate_proj": 0, "up_proj": 1, "down_proj": 2}


def routed_projection(dense: torch.Tensor, name: str, sparsity: Sparsity, layer: int, expert: int) -> torch.Tensor:
    """One projection of a routed expert.

    Args:
        dense: that of the layer's dense FFN: "gate_proj" and "up_proj" [I, H], "down_proj" [H, I].

    Returns:
        [I / granularity, H], or its transpose's shape for "down_proj"; `dense` itself when the expert is a copy. In the
        dtype of `dense`, or in float32 where that could not hold the scaled weights (see `loses_bits`).
    """
    inner_dim = 1 if name == "down_proj" else 0
    part = dense
    if sparsity.granularity > 1:
        width = dense.shape[inner_dim] // sparsity.granularity
        part = dense.narrow(inner_dim, expert % sparsity.granularity * width, width)
        if name == "down_proj" and sparsity.split == "virtual-groups":
            part = (part.float() if loses_bits(sparsity, part.dtype) else part) * sparsity.granularity
    if sparsity.drop_ratio:
        part = _with_new_dimensions(part, name, inner_dim, sparsity, layer, expert)
    if sparsity.noise:
        generator = _generator(sparsity, layer, expert, _NOISE + _PROJECTION_OFFSET[name])
        part = _with_noise(part, sparsity.noise, generator)
    return part


def shared_projection(dense: torch.Tensor, name: str, config: UniMoeTextConfig) -> torch.Tensor:
    """One projection of a shared expert: the first `shared_intermediate_size` inner dimensions of the dense FFN."""
    return dense.narrow(1 if name == "down_proj" else 0, 0, config.shared_intermediate_size)


def expected_deviation(config: UniMoeTextConfig, sparsity: Sparsity, dtype: torch.dtype = torch.float32) -> float:
    """How far a sparse layer's FFN starts from the dense one, relative to the size of its output; 0 for exact ways.

    An estimate to first order, of independent weights and a router without preference. A capacity is left out: what it
    drops depends on the batch.

    Args:
        dtype: of the stored weights.
    """
    k, experts, null = sparsity.num_experts_per_tok, sparsity.num_experts, sparsity.num_null_experts
    ratio, squares = sparsity.drop_ratio, 0.0
    # Copies that a token mixes; what each of them draws is averaged over these.
    copies = k / sparsity.parts_per_copy
    squares += 3 * sparsity.noise**2 / copies  # each of three matrices turns its input by that much
    squares += ratio**2 + ratio * (1 - ratio) / copies + ratio / copies  # what is lost, and what comes instead
    if null:
        lost = null / (experts + null)
        spread = lost * (1 - lost) / k * (experts + null - k) / max(experts + null - 1, 1)
        squares += lost**2 + spread
    if sparsity.granularity > 1 and sparsity.split == "slices":
        squares += 1 - 2 / sparsity.granularity + 1 / (sparsity.granularity * k)
    if loses_bits(sparsity, dtype):
        squares += (_ROUNDING * torch.finfo(dtype).eps) ** 2
    if not config.norm_topk_prob:
        squares += _missing_weight(config) ** 2
    return math.sqrt(squares)


def _missing_weight(config: UniMoeTextConfig) -> float:
    """How much a token's weights lack of one, without normalisation and preference."""
    k, shared = config.num_experts_per_tok, config.num_shared_experts
    sums = []
    for group in config.router_groups:
        rows = len(group.experts) + config.num_null_experts + shared
        sums.append((k + shared) * (1 / rows if config.router_scoring == "softmax" else 0.5))
    return 1 - sum(sums) / len(sums)


def _with_new_dimensions(
    part: torch.Tensor, name: str, inner_dim: int, sparsity: Sparsity, layer: int, expert: int
) -> torch.Tensor:
    """The inner dimensions are the same in all three projections of an expert; each has statistics of its own."""
    width = part.shape[inner_dim]
    count = round(width * sparsity.drop_ratio)
    if not count:
        return part
    order = torch.randperm(width, generator=_generator(sparsity, layer, expert, _DIMENSIONS))
    chosen = order[:count].sort().values
    new = part.clone()
    # Inner dimensions as rows; these are views.
    source, target = (part, new) if inner_dim == 0 else (part.T, new.T)
    blocks = chosen.split(max(1, _BLOCK // source.shape[1]))
    mean, deviation = _mean_and_deviation(source[rows] for rows in blocks)
    generator = _generator(sparsity, layer, expert, _NEW + _PROJECTION_OFFSET[name])
    for rows in blocks:
        drawn = torch.randn(len(rows), source.shape[1], generator=generator)
        target[rows] = drawn.mul_(deviation).add_(mean).to(part.dtype)
    return new


def _with_noise(part: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    new = part.clone(memory_format=torch.contiguous_format)
    blocks = new.split(max(1, _BLOCK // new.shape[1]))
    _, deviation = _mean_and_deviation(blocks)
    for block in blocks:
        block.copy_(block + noise * deviation * torch.randn(block.shape, generator=generator))
    return new


def _mean_and_deviation(blocks: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Of all values together, in float64."""
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        values = block.double()
        count, total, squares = (
            count + values.numel(),
            total + float(values.sum()),
            squares + float(values.square().sum()),
        )
    mean = total / count
    return mean, math.sqrt(max(squares - count * mean**2, 0.0) / max(count - 1, 1))


def _generator(sparsity: Sparsity, layer: int, expert: int, purpose: int) -> torch.Generator:
    mixed = ((sparsity.seed * 1_000_003 + layer) * 8191 + expert) * 16 + purpose + 1
    return torch.Generator().manual_seed(mixed * 2_654_435_761 % (1 << 62))


__all__ = ["expected_deviation", "routed_projection", "shared_projection"]
