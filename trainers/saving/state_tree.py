"""Nested states (optimizers, schedules, random numbers) as JSON and safetensors, so that nothing is ever unpickled.

`NAME.json` holds the structure, `NAME.safetensors` the tensors that it points to.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...errors import CheckpointError

_KINDS = {"tensor", "array", "tuple", "dict"}


def save_tree(tree: Any, folder: Path, name: str) -> None:
    """Write numbers, texts, tensors and arrays in lists, tuples and dicts; all come back as they were.

    Raises:
        CheckpointError: the tree holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_encoded(tree, name, tensors))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(structure, encoding="utf-8")


def load_tree(folder: Path, name: str) -> Any:
    """Read what `save_tree` wrote; tensors are on the CPU. Raises CheckpointError where it is missing or damaged."""
    try:
        structure = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return _decoded(structure, load_file(folder / f"{name}.safetensors"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"The state {name!r} cannot be read from {folder}: {type(error).__name__}: {error}. The checkpoint holds weights "
            "only, is damaged, or another program wrote it: go on from another one."
        ) from error


def has_tree(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def _encoded(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value)
    if isinstance(value, torch.Tensor):
        return {"tensor": _stored(value.detach().cpu().contiguous(), place, tensors)}
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {"array": _stored(torch.from_numpy(np.ascontiguousarray(value)), place, tensors)}
    if isinstance(value, list | tuple):
        items = [_encoded(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, int | str) for key in value):
        return {"dict": [[key, _encoded(item, f"{place}.{key}", tensors)] for key, item in value.items()]}
    raise CheckpointError(
        f"{place} is a {type(value).__name__}, which cannot be saved without pickling: use another optimizer or schedule."
    )


def _stored(tensor: torch.Tensor, place: str, tensors: dict[str, torch.Tensor]) -> str:
    while place in tensors:  # keys 1 and "1"
        place += "_"
    tensors[place] = tensor
    return place


def _decoded(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not _KINDS.issuperset(value):
        raise ValueError(f"{sorted(value)} is no part of a state")
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tuple":
        return tuple(_decoded(item, tensors) for item in content)
    return {key: _decoded(item, tensors) for key, item in content}
