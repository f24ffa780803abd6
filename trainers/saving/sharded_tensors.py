"""Parts of tensors that are spread over ranks: which region a rank holds, and filling it from files of other regions."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import CheckpointError


class Region(NamedTuple):
    """A box of a tensor: `offsets` [dims] where it begins, `sizes` [dims]."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def overlap(self, other: "Region") -> "Region | None":
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(map(min, self._ends(), other._ends()))
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return None if any(size <= 0 for size in sizes) else Region(starts, sizes)

    def slices(self, within: "Region") -> tuple[slice, ...]:
        """This region's place inside of a larger one."""
        starts = [own - outer for own, outer in zip(self.offsets, within.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))

    def in_whole(self) -> tuple[slice, ...]:
        """This region's place in the tensor."""
        return tuple(slice(start, end) for start, end in zip(self.offsets, self._ends(), strict=True))

    def _ends(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.offsets, self.sizes, strict=True)))


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every rank; all ranks that hold a part must call it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def reshard(model: torch.nn.Module) -> None:
    """Let every parameter be its rank's shard again: FSDP2 leaves the outermost ones whole after a forward pass without
    a backward pass, and an optimizer that is made then moves the whole ones, in vain.
    """
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward") and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def own_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Region, bool]:
    """What this rank holds of a tensor, as one box; all ranks that hold a part must call it together.

    Returns:
        The local values, their region, and whether this rank is the first of those that hold them.
    """
    if not is_sharded(tensor):
        return tensor, _whole(tensor), True
    boxed = tensor.redistribute(placements=_boxes(tensor))  # type: ignore[attr-defined]
    mesh, coordinate = boxed.device_mesh, boxed.device_mesh.get_coordinate()
    region = _region(tuple(tensor.shape), boxed.placements, mesh, coordinate)
    copies = [place for place, p in zip(coordinate, boxed.placements, strict=True) if p.is_replicate()]
    # Tensor ranks with a whole copy each share it out in meshes of their own, of which one has the first rank.
    first = not any(copies) and bool((mesh.mesh == 0).any())
    return boxed.to_local(), region, first


@torch.no_grad()
def filled_like(tensor: torch.Tensor, read: Callable[[Region], torch.Tensor]) -> torch.Tensor:
    """A tensor spread over ranks as the given one is, with other values; each rank reads its own region only.

    Args:
        read: region -> its values; called at most once, and not for an empty region.
    """
    if not is_sharded(tensor):
        return read(_whole(tensor)).to(device=tensor.device, dtype=tensor.dtype)
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, _boxes(tensor)  # type: ignore[attr-defined]
    region = _region(tuple(tensor.shape), placements, mesh, mesh.get_coordinate())
    local = tensor.to_local()  # type: ignore[attr-defined]
    values = local.new_empty(region.sizes)
    if all(region.sizes):
        values.copy_(read(region))
    boxed = DTensor.from_local(values, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
    return boxed.redistribute(placements=tensor.placements)  # type: ignore[attr-defined]


def require_shapes(where: Path, tensors: Mapping[str, torch.Tensor], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError if tensors have other shapes in a file or folder: parts of larger ones would fit as well."""
    wrong = [name for name, tensor in tensors.items() if tuple(tensor.shape) != found[name]]
    if wrong:
        raise CheckpointError(
            f"{where} has {wrong[0]} in the shape {list(found[wrong[0]])}, but this run has {list(tensors[wrong[0]].shape)} "
            f"({len(wrong)} differ): go on with the settings of the run that wrote it, or start in another folder."
        )


@torch.no_grad()
def fill_parts(tensors: Mapping[str, torch.Tensor], read: Callable[[str, Region], torch.Tensor]) -> None:
    """Give tensors, whole or spread over ranks, other values; each rank reads its own regions only.

    Args:
        read: name, region -> its values.
    """
    for name, tensor in tensors.items():
        values = filled_like(tensor, partial(read, name))
        if is_sharded(tensor):
            tensor.to_local().copy_(values.to_local())  # type: ignore[attr-defined]
        else:
            tensor.copy_(values)


def _whole(tensor: torch.Tensor) -> Region:
    return Region((0,) * tensor.dim(), tuple(tensor.shape))


def _boxes(tensor: Any) -> tuple[Any, ...]:
    """The placements, with shards of experts that also FSDP cuts, which are no box, laid out one after the other."""
    from torch.distributed.tensor import Replicate, Shard

    # Strided shards are a subclass in some releases of torch and a class of their own in others.
    return tuple(Shard(p.dim) if hasattr(p, "dim") else Replicate() for p in tensor.placements)


def _region(shape: tuple[int, ...], placements: Any, mesh: Any, coordinate: list[int]) -> Region:
    offsets, sizes = [0] * len(shape), list(shape)
    for number, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        dim, ranks = placement.dim, mesh.size(number)
        length = -(-sizes[dim] // ranks)
        start = min(length * coordinate[number], sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(length, sizes[dim] - start)
    return Region(tuple(offsets), tuple(sizes))
