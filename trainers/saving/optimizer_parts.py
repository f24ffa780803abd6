"""The optimizer's state of a model that is spread over ranks, by the names of parameters.

optimizer_parts.json                            the parameters, and their state's scalars (the step)
optimizer_parts-00000-of-00002.safetensors      what the first of two ranks holds of the moments

Each rank writes what it holds, and reads what it needs; nobody ever has the whole state. Any number of ranks can read
it, and reads here too what one process wrote with `optimizer_state`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ...errors import CheckpointError
from .optimizer_state import WHOLE_STATE, tensors_of_state
from .sharded_tensors import Region, filled_like, own_part

PARTS_FILE = "optimizer_parts.json"
_PARTS = "optimizer_parts-{:05d}-of-{:05d}.safetensors"


class _Part(NamedTuple):
    file: Path
    key: str
    region: Region


def save_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of this rank; all ranks must call it."""
    rank, ranks = _rank(), _ranks()
    tensors: dict[str, torch.Tensor] = {}
    offsets: dict[str, tuple[int, ...]] = {}
    scalars: dict[str, dict[str, float]] = {}
    for number, (name, state) in enumerate(_states(model, optimizer)):
        scalars[name] = {}
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or not value.dim():
                scalars[name][key] = float(value)
                continue
            local, region, first = own_part(value)
            if first and all(region.sizes) and (local is not value or number % ranks == rank):
                tensors[f"{name}/{key}"] = local.detach().cpu().contiguous()
                offsets[f"{name}/{key}"] = region.offsets
    save_file(tensors, folder / _PARTS.format(rank, ranks), metadata={"offsets": json.dumps(offsets)})
    if rank == 0:
        (folder / PARTS_FILE).write_text(json.dumps({"ranks": ranks, "state": scalars}), encoding="utf-8")


def load_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the state for the parameters of this optimizer, however many ranks wrote it; all ranks must call it.

    Raises:
        CheckpointError: the checkpoint has the state of other parameters, or a part of it is missing.
    """
    if (folder / PARTS_FILE).is_file():
        saved = json.loads((folder / PARTS_FILE).read_text(encoding="utf-8"))
        scalars, parts = saved["state"], _parts(folder, saved["ranks"])
    else:
        scalars, parts = _whole_state(folder)
    names = _names(model, optimizer)
    if different := sorted(set(scalars) ^ set(names.values())):
        raise CheckpointError(
            f"The optimizer's state in {folder} and this run differ in what they train, e.g. {different[:3]}: "
            "resume with the settings of the run that wrote it, or start in another folder."
        )
    own = optimizer.state_dict()
    # state_dict numbers parameters in the order of the groups.
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own["state"] = {}
    for number, parameter in enumerate(order):
        own["state"][number] = _state(names[parameter], parameter, scalars[names[parameter]], parts)
    optimizer.load_state_dict(own)


def _state(
    name: str, parameter: torch.Tensor, scalars: Mapping[str, float], parts: Mapping[str, list[_Part]]
) -> dict[str, Any]:
    state: dict[str, Any] = {key: torch.tensor(value, dtype=torch.float32) for key, value in scalars.items()}
    for key, found in parts.items():
        owner, _, moment = key.rpartition("/")
        if owner == name:
            state[moment] = filled_like(parameter, lambda region, found=found: _read(found, region))
    return state


def _read(parts: list[_Part], region: Region) -> torch.Tensor:
    values: torch.Tensor | None = None
    filled = 0
    for part in parts:
        common = region.overlap(part.region)
        if common is None:
            continue
        with safe_open(part.file, framework="pt") as file:
            piece = file.get_slice(part.key)[common.slices(part.region)]
        if values is None:
            values = piece.new_empty(region.sizes)
        values[common.slices(region)] = piece
        filled += piece.numel()
    if values is None or filled != values.numel():
        raise CheckpointError(
            f"{parts[0].file.parent} has only a part of the optimizer's state {parts[0].key}: a rank's file is missing. "
            "Put it back, or go on from an older checkpoint."
        )
    return values


def _parts(folder: Path, ranks: int) -> dict[str, list[_Part]]:
    found: dict[str, list[_Part]] = {}
    for rank in range(ranks):
        path = folder / _PARTS.format(rank, ranks)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: put it back, or go on from an older checkpoint.")
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()["offsets"])
            for key, start in offsets.items():
                region = Region(tuple(start), tuple(file.get_slice(key).get_shape()))
                found.setdefault(key, []).append(_Part(path, key, region))
    return found


def _whole_state(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, list[_Part]]]:
    """Scalars and parts of a state that one process wrote; only its scalars are read here."""
    file = folder / f"{WHOLE_STATE}.safetensors"
    scalars: dict[str, dict[str, float]] = {}
    parts: dict[str, list[_Part]] = {}
    with safe_open(file, framework="pt") as opened:
        for name, key, place in tensors_of_state(folder):
            shape = tuple(opened.get_slice(place).get_shape())
            if shape:
                parts[f"{name}/{key}"] = [_Part(file, place, Region((0,) * len(shape), shape))]
            else:
                scalars.setdefault(name, {})[key] = float(opened.get_tensor(place))
    return scalars, parts


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    for parameter, name in _names(model, optimizer).items():
        if parameter in optimizer.state:
            yield name, optimizer.state[parameter]


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
    """The optimizer's parameters, in an order that does not depend on its groups."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {parameter: name for name, parameter in model.named_parameters() if parameter in trained}


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
