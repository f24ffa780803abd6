"""What training has changed: two models of one shape, tensor by tensor, summed up by role and for every router."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..conversion.checkpoints.checkpoint_reader import Checkpoint
from ..errors import ConversionError
from ..roles import ROLES, role_of

_CHUNK = 1 << 24
_LISTED = 5


@dataclass
class RoleChange:
    """Of the tensors of one role: how many there are and differ, |b - a| over |a|, and the largest single difference."""

    role: str
    tensors: int
    changed: int
    parameters: int
    relative: float
    largest: float


@dataclass
class RouterChange:
    """Of one gate: |b - a| over the larger of both sizes, and the cosine between each row before and after."""

    layer: int
    drift: float
    row_cosines: list[float]


@dataclass
class WeightChanges:
    """The whole comparison; the names are of tensors that only one model has, or with another shape."""

    roles: list[RoleChange]
    routers: list[RouterChange]
    only_before: list[str]
    only_after: list[str]
    other_shape: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def weight_changes(before: Path, after: Path, on_tensor: Callable[[], None] | None = None) -> WeightChanges:
    """Compare two model folders, one piece of a tensor in memory at a time.

    Raises:
        ConversionError: a folder's weights are damaged, or the two have no tensor in common.
    """
    a, b = Checkpoint(before), Checkpoint(after)
    both = sorted(set(a.tensors) & set(b.tensors))
    alike = [name for name in both if a.tensors[name].shape == b.tensors[name].shape]
    if not alike:
        raise ConversionError(
            f"{before} and {after} have no tensor of the same name and shape: these are other models."
        )
    sums: dict[str, _Sums] = {}
    routers = []
    for name in alike:
        sums.setdefault(role_of(name), _Sums()).add(*_gap(a, b, name), math.prod(a.tensors[name].shape))
        if name.endswith(".mlp.gate.weight"):
            routers.append(_router(name, a.read(name).double(), b.read(name).double()))
        if on_tensor is not None:
            on_tensor()
    return WeightChanges(
        [sums[role].change(role) for role in ROLES if role in sums],
        sorted(routers, key=lambda router: router.layer),
        sorted(set(a.tensors) - set(b.tensors)),
        sorted(set(b.tensors) - set(a.tensors)),
        sorted(set(both) - set(alike)),
    )


def shared_tensors(before: Path, after: Path) -> int:
    """How often `on_tensor` will be called."""
    a, b = Checkpoint(before).shapes, Checkpoint(after).shapes
    return sum(b.get(name) == shape for name, shape in a.items())


def unmatched_text(changes: WeightChanges) -> list[str]:
    """What could not be compared, in sentences."""
    parts = {
        "only the earlier model has": changes.only_before,
        "only the later model has": changes.only_after,
        "the shapes differ of": changes.other_shape,
    }
    return [
        f"{what} {len(names)} tensors: {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
        for what, names in parts.items()
        if names
    ]


@dataclass
class _Sums:
    """Over the tensors of a role; `gap` and `size` are sums of squares, of the difference and of what was before."""

    tensors: int = 0
    changed: int = 0
    parameters: int = 0
    gap: float = 0.0
    size: float = 0.0
    largest: float = 0.0

    def add(self, gap: float, size: float, largest: float, parameters: int) -> None:
        self.tensors += 1
        self.changed += largest > 0
        self.parameters += parameters
        self.gap += gap
        self.size += size
        self.largest = max(self.largest, largest)

    def change(self, role: str) -> RoleChange:
        relative = math.sqrt(self.gap / self.size) if self.size else float(self.gap > 0)
        return RoleChange(role, self.tensors, self.changed, self.parameters, relative, self.largest)


def _gap(a: Checkpoint, b: Checkpoint, name: str) -> tuple[float, float, float]:
    """The sums of the squares of the difference and of the first tensor, and the largest difference."""
    count = math.prod(a.tensors[name].shape)
    gap = size = largest = 0.0
    for start in range(0, count, _CHUNK):
        length = min(_CHUNK, count - start)
        x, y = (checkpoint.read_flat(name, start, length).float() for checkpoint in (a, b))
        difference = y - x
        gap += float(difference.square().sum(dtype=torch.float64))
        size += float(x.square().sum(dtype=torch.float64))
        largest = max(largest, float(difference.abs().max()))
    return gap, size, largest


def _router(name: str, before_RH: torch.Tensor, after_RH: torch.Tensor) -> RouterChange:
    size = max(float(before_RH.norm()), float(after_RH.norm()))
    drift = float((after_RH - before_RH).norm()) / size if size else 0.0
    cosines = torch.nn.functional.cosine_similarity(before_RH, after_RH, dim=1).tolist()
    return RouterChange(int(name.split(".layers.")[1].split(".")[0]), drift, cosines)
