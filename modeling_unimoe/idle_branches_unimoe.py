"""Branches whose modality a training batch lacks, run on one medium of zeros whose result counts nothing.

Ranks that average gradients, or that share out weights (FSDP, ZeRO-3), must run the same modules: one whose batch holds
text only would make the others wait for ever. And a parameter that is trained has a gradient in every step, if only 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def must_run(module: nn.Module | None) -> bool:
    """Whether other ranks may wait for a module: it has weights that are trained, or shared out over ranks."""
    if module is None:
        return False
    return any(p.requires_grad for p in module.parameters()) or is_shared_out(module)


def is_shared_out(module: nn.Module) -> bool:
    """Whether ranks share out the module's weights or experts, so that they must go through it together both ways."""
    return any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in module.parameters())


@contextmanager
def not_training(module: nn.Module) -> Iterator[None]:
    """Batch norms must not learn from zeros, and need more than one medium to do so."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def zero_medium(modality: str, tower_config: Any, scale: int, device: torch.device) -> torch.Tensor:
    """The smallest input of a branch's tower, all zeros.

    Args:
        scale: pictures are so many times as large as the tower's.

    Returns:
        [1, channels, H, W] for images, [1, 1, channels, H, W] for videos, [1, mels, frames] for Whisper, [1, frames, mels]
        for BEATs.
    """
    if modality in ("image", "video"):
        side = scale * tower_config.image_size
        shape = (1, getattr(tower_config, "num_channels", 3), side, side)
        return torch.zeros(shape if modality == "image" else (1, *shape), device=device)
    if tower_config.model_type == "whisper":  # takes windows of one length only
        return torch.zeros(1, tower_config.num_mel_bins, 2 * tower_config.max_source_positions, device=device)
    return torch.zeros(1, tower_config.patch_size, tower_config.num_mel_bins, device=device)


def without_value(features: torch.Tensor) -> torch.Tensor:
    """A scalar 0 whose gradient reaches everything that the features come from."""
    return features.float().mean() * 0.0
