"""The tensors of a released model, one at a time, out of a checkpoint of ours; for exports."""

from collections.abc import Iterable

import torch

from ..checkpoints.checkpoint_reader import Checkpoint
from ..checkpoints.key_rules import KeyMap


class Originals:
    """What the tensors of a checkpoint of ours are in the original.

    Args:
        experts: how many each fused tensor holds.
        layers: how many layers of the original have a copy of a shared table.

    Attributes:
        sources: original name -> the tensors of ours that it is made of.
    """

    def __init__(self, checkpoint: Checkpoint, key_map: KeyMap, experts: int, layers: int = 1) -> None:
        self.checkpoint, self.key_map = checkpoint, key_map
        self.sources: dict[str, list[str]] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        for ours in checkpoint.tensors:
            for original in key_map.originals(ours, experts, layers):
                self.sources.setdefault(original, []).append(ours)

    def names(self, *prefixes: str) -> list[str]:
        return [name for name in self.sources if name.startswith(prefixes)]

    def read(self, original: str) -> torch.Tensor:
        return self.key_map.restore(original, self._ours).clone()

    def read_all(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self.read(name) for name in names}

    def shape(self, original: str) -> tuple[int, ...]:
        """The shape of an original that is a copy, an expert's part or fused; not of a weight norm's magnitude."""
        shapes = []
        for place in self.key_map.places(original):
            rule, shape = place.rule, self.checkpoint.tensors[place.target].shape
            if rule.filled is not None:
                shape = (rule.filled.stop - rule.filled.start, *shape[1:])
            elif rule.how == "expert":
                shape = (shape[1] // rule.parts, *shape[2:])
            shapes.append(shape)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def _ours(self, name: str) -> torch.Tensor:
        """One tensor stays in memory: the experts of a layer are cut out of the same one, one after the other."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self.checkpoint.read(name))
        return self._last[1]
