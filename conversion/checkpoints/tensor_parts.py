"""Tensors that other checkpoints fuse or name differently, seen one by one under the names that LLaMA uses.

A `Part` says which rows of which stored tensor make up a tensor. A `PartsView` of a checkpoint offers the parts as if
they were stored so; it reads no more than the rows asked for, so that conversions stream through it as they do through
the checkpoint itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ...errors import ConversionError
from .checkpoint_reader import Checkpoint, TensorInfo

RowRange = tuple[int, int]  # first row, and the row behind the last


@dataclass(frozen=True)
class Part:
    """A tensor as rows of a stored one, one range after the other; no ranges mean all of it."""

    stored: str
    rows: tuple[RowRange, ...] = ()

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape, from that of the stored tensor. Raises ConversionError when rows are missing there."""
        if not self.rows:
            return tuple(stored)
        if not stored or max(stop for _, stop in self.rows) > stored[0]:
            raise ConversionError(
                f"{self.stored} has shape {list(stored)}, but the sizes in config.json ask for rows up to "
                f"{max(stop for _, stop in self.rows)}. Weights and config.json do not belong together."
            )
        return (sum(stop - start for start, stop in self.rows), *stored[1:])

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        """The part of a tensor in memory; a view where it is in one piece."""
        if not self.rows:
            return stored
        pieces = [stored[start:stop] for start, stop in self.rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def consecutive(stored: str, sizes: tuple[int, ...]) -> list[Part]:
    """Parts of so many rows each, one after the other: Phi-3's q, k and v, or its gate and up."""
    parts, start = [], 0
    for size in sizes:
        parts.append(Part(stored, ((start, start + size),)))
        start += size
    return parts


def interleaved(stored: str, groups: int, sizes: tuple[int, ...]) -> list[Part]:
    """Parts whose rows alternate, `sizes` of each in every group: InternLM2's q, k and v per key-value head."""
    stride, parts, start = sum(sizes), [], 0
    for size in sizes:
        ranges = tuple((group * stride + start, group * stride + start + size) for group in range(groups))
        parts.append(Part(stored, ranges))
        start += size
    return parts


class PartsView(Checkpoint):
    """A checkpoint with other names for its tensors, and parts of them in the place of fused ones.

    Args:
        checkpoint: what is read.
        parts: name here -> where it is. Stored tensors that no part uses are not seen.

    Raises:
        ConversionError: a part asks for rows that its stored tensor lacks.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Mapping[str, Part]) -> None:
        self.stored, self.parts = checkpoint, dict(parts)
        super().__init__(checkpoint.folder)
        self.in_few_bits = checkpoint.in_few_bits

    def _read_headers(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, part in self.parts.items():
            info = self.stored.tensors[part.stored]
            infos[name] = replace(info, shape=part.shape(info.shape))
        return infos

    def read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        part = self.parts[name]
        if not part.rows:
            return self.stored.read_flat(part.stored, start, count)
        width = math.prod(self.stored.tensors[part.stored].shape[1:])
        if len(part.rows) == 1:
            return self.stored.read_flat(part.stored, part.rows[0][0] * width + start, count)
        out = torch.empty(count, dtype=self.tensors[name].dtype)
        passed = 0  # values of this part before the range at hand
        for first, last in part.rows:
            length = (last - first) * width
            low, high = max(start, passed), min(start + count, passed + length)
            if low < high:
                piece = self.stored.read_flat(part.stored, first * width + low - passed, high - low)
                out[low - start : high - start] = piece
            passed += length
        return out


__all__ = ["Part", "PartsView", "consecutive", "interleaved"]
