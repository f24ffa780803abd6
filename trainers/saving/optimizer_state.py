"""An optimizer's state by the names of its parameters, which outlive their order and their split over processes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError

WHOLE_STATE = "optimizer"  # the name under which `state_tree` keeps it


def tensors_of_state(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Parameter, key of its state (as "exp_avg") and name in the file of every tensor of a saved state, unread."""
    tree = _mapping(json.loads((folder / f"{WHOLE_STATE}.json").read_text(encoding="utf-8")))
    for parameter, state in _mapping(tree["state"]).items():
        for key, value in _mapping(state).items():
            yield parameter, key, value["tensor"]


def _mapping(encoded: dict[str, Any]) -> dict[str, Any]:
    return dict(encoded["dict"])


def state_by_name(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """{"groups": per group its options and the "names" of its parameters, "state": name -> state}.

    Tensors that are spread over processes are put together, so all of them have to call this.
    """
    names = _names(optimizer, model)
    saved = optimizer.state_dict()
    groups = []
    for group in saved["param_groups"]:
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append({**options, "names": [names[index] for index in group["params"]]})
    state = {
        names[index]: {key: _whole(value) for key, value in values.items()} for index, values in saved["state"].items()
    }
    return {"groups": groups, "state": state}


def load_state_by_name(optimizer: Any, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give an optimizer back what `state_by_name` took from one over the same parameters.

    Raises:
        CheckpointError: the parameters differ, or are grouped otherwise.
    """
    names = _names(optimizer, model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    now = {frozenset(names[i] for i in group["params"]): group for group in optimizer.state_dict()["param_groups"]}
    then = {frozenset(group["names"]): group for group in saved["groups"]}
    if now.keys() != then.keys():
        different = sorted(frozenset().union(*now) ^ frozenset().union(*then))
        what = f"other parameters than this run, e.g. {different[:3]}" if different else "other groups of parameters"
        raise CheckpointError(
            f"The checkpoint's optimizer trained {what}: resume with the settings of the run that wrote it, or start in "
            "another folder."
        )
    groups = []
    for members, group in now.items():  # in this optimizer's order
        options = {key: value for key, value in then[members].items() if key != "names"}
        groups.append({**options, "params": group["params"]})
    state = {
        numbers[name]: {key: _placed(value, parameters[numbers[name]]) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names(optimizer: Any, model: nn.Module) -> list[str]:
    """The name of every parameter, in the order in which the optimizer numbers them."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := sum(id(parameter) not in name_of for parameter in parameters):
        raise CheckpointError(
            f"{strangers} of the optimizer's {len(parameters)} parameters are not the model's, so its state cannot be saved: "
            "make the optimizer from the model that is trained."
        )
    return [name_of[id(parameter)] for parameter in parameters]


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _placed(value: Any, parameter: Any) -> Any:
    """A state as its parameter is spread: moments have its shape, counters do not."""
    if not hasattr(parameter, "full_tensor") or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
