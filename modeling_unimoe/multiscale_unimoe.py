"""S2: one vision tower at several scales of a picture (arXiv 2403.13043; MoIIE's `use_s2`).

A scale of n shows the tower the picture at n times its own size, cut into n x n tiles. The maps of a scale's tiles make
one map again, which area interpolation brings to the size of the first scale's; the scales' channels follow each other.

Shape suffixes: N pictures, C channels of a picture, D channels of the tower, h and w sides of a map of patches.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .errors_unimoe import ConfigurationError


def encode_scales(
    encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, scales: Sequence[int], tile_size: int
) -> torch.Tensor:
    """States of pictures at several scales.

    Args:
        encode: from tiles [n, C, tile_size, tile_size] to states [n, P, D] of the P patches of each, no class token.
        pixels: [N, C, H, W], best at the size of the largest scale; every scale is made from them by bicubic
            interpolation in float32.
        scales: multiples of the tower's size.
        tile_size: the tower's own side in pixels.

    Returns:
        [N, P of the first scale, D * number of scales].
    """
    maps = []
    for scale in scales:
        resized = F.interpolate(pixels.float(), size=(scale * tile_size,) * 2, mode="bicubic").to(pixels.dtype)
        maps.append(_join_tiles(encode(_cut_tiles(resized, scale)), scale))
    side = maps[0].shape[-2:]
    same = [F.interpolate(map_.float(), size=side, mode="area").to(map_.dtype) for map_ in maps]
    return torch.cat(same, dim=1).flatten(2).transpose(1, 2)


def _cut_tiles(pixels: torch.Tensor, count: int) -> torch.Tensor:
    """[N, C, count * s, count * s] -> [count * count * N, C, s, s]: first every picture's first tile, and so on."""
    tiles = pixels.unflatten(3, (count, -1)).unflatten(2, (count, -1))  # N, C, row, s, column, s
    return tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def _join_tiles(states: torch.Tensor, count: int) -> torch.Tensor:
    """[count * count * N, P, D] -> [N, D, count * h, count * w]."""
    side = math.isqrt(states.shape[1])
    if side * side != states.shape[1]:
        raise ConfigurationError(
            f"vision_scales needs a tower whose patches make a square map, and this one gives {states.shape[1]} per "
            "tile: change vision_feature_select_strategy ('patch' drops a first class token), or set it to None."
        )
    maps = (
        states.transpose(1, 2).unflatten(2, (side, side)).unflatten(0, (count, count, -1))
    )  # row, column, N, D, h, w
    return maps.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)
