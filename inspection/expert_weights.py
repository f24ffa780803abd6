"""How far apart the experts of a layer are, by their weights: two that are nearly equal do the work of one."""

from pathlib import Path

import torch

from ..conversion.checkpoints.bitsandbytes_tensors import held_by_torchao
from ..conversion.checkpoints.checkpoint_reader import Checkpoint
from ..errors import ConversionError
from ..modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig

# Experts are duplicates when the distance of their weights is below this share of the weights' own size.
DUPLICATE_BELOW = 1e-3
# Values of each expert that are in memory at once.
_CHUNK = 1 << 22
_TENSORS = ("gate_up_proj", "down_proj")


def expert_distances(folder: Path, config: UniMoeTextConfig) -> list[list[list[float]]]:
    """Per sparse layer the distances between all experts, [E][E]: |a - b| over the mean size of both.

    0 for equal weights, about 1.4 for unrelated ones. Weights are read piece by piece.

    Raises:
        ConversionError: the folder's weights are damaged or quantised, or lack an expert tensor.
    """
    checkpoint = Checkpoint(folder)
    return [_distances(checkpoint, layer, config.num_experts).tolist() for layer in sorted(config.sparse_layers)]


def duplicates(distances: list[list[float]]) -> list[tuple[int, int]]:
    """Pairs of experts of one layer that are nearly equal."""
    size = len(distances)
    return [(a, b) for a in range(size) for b in range(a + 1, size) if distances[a][b] < DUPLICATE_BELOW]


def _distances(checkpoint: Checkpoint, layer: int, num_experts: int) -> torch.Tensor:
    squares_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    sizes_E = torch.zeros(num_experts, dtype=torch.float64)
    for part in _TENSORS:
        name = f"model.language_model.layers.{layer}.mlp.experts.{part}"
        if checkpoint.in_few_bits or held_by_torchao(checkpoint.tensors):
            raise ConversionError(
                f"{checkpoint.folder} was saved with quantised weights, between which no distances are measured: look into "
                "the folder that it was made of, with --quantize."
            )
        if name not in checkpoint.tensors:
            raise ConversionError(f"{checkpoint.folder} lacks {name}: fetch or convert the model again.")
        count = checkpoint.tensors[name].shape[1] * checkpoint.tensors[name].shape[2]
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            pieces = [checkpoint.read_flat(name, e * count + start, size).float() for e in range(num_experts)]
            values_EN = torch.stack(pieces)
            sizes_E += values_EN.square().sum(dim=1, dtype=torch.float64)
            # Around their mean, else the difference of nearly equal experts is lost in their size.
            values_EN -= values_EN.mean(dim=0)
            squares_EE += (values_EN @ values_EN.T).double()
    own_E = squares_EE.diagonal()
    gaps_EE = (own_E[:, None] + own_E[None, :] - 2 * squares_EE).clamp(min=0).sqrt()
    mean_EE = (sizes_E[:, None].sqrt() + sizes_E[None, :].sqrt()) / 2
    return gaps_EE / mean_EE.clamp(min=torch.finfo(torch.float64).tiny)
