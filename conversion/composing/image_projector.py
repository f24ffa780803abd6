"""An image projector that was trained apart from its model: LLaVA's mm_projector.bin and the like."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ...errors import ConversionError
from ..checkpoints.checkpoint_reader import Checkpoint, TensorFile
from .composed_part import ComposedPart, Made

CONNECTOR = "model.image_connector."
# Name, and what place among the linear layers its number stands for.
_NAMES = (
    (re.compile(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)"), 2, 0),
    (re.compile(r"(?:.*\.)?multi_modal_projector\.linear_(\d+)\.(weight|bias)"), 1, 1),
    (re.compile(r"(?:.*\.)?image_connector\.layers\.(\d+)\.(weight|bias)"), 1, 0),
)


def open_projector(path: Path, role: str = "image projector") -> ComposedPart:
    """The projector in a file of tensors.

    Raises:
        ConversionError: the file holds none, or not all of one.
    """
    file = TensorFile(path)
    tensors = projector_tensors(file, file.shapes)
    if not tensors:
        raise ConversionError(
            f"{path} holds no image projector: names like model.mm_projector.0.weight are needed, but there is "
            f"{next(iter(sorted(file.tensors)), 'nothing')}."
        )
    used = {name for made in tensors.values() for name in made.made_of}
    dropped = {name: "not part of the image projector" for name in file.tensors if name not in used}
    depth, width = projector_sizes(tensors)
    return ComposedPart(role, str(path), path, f"mlp of {depth} layers, from {width}", (path,), tensors, dropped)


def projector_tensors(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Made]:
    """The projector among some tensors of a checkpoint, by our names; empty where there is none.

    Raises:
        ConversionError: a layer or its bias is missing.
    """
    layers: dict[int, dict[str, str]] = {}
    for name in shapes:
        for pattern, step, first in _NAMES:
            if match := pattern.fullmatch(name):
                layers.setdefault((int(match[1] or 0) - first) // step, {})[match[2]] = name
    for index in range(max(layers, default=-1) + 1):
        if missing := {"weight", "bias"} - set(layers.get(index, {})):
            raise ConversionError(
                f"The image projector in {checkpoint.folder} lacks the {sorted(missing)[0]} of its layer {index}; a chain "
                "of linear layers with biases is needed. Fetch the file again."
            )
    return {
        f"{CONNECTOR}layers.{index}.{kind}": Made(shapes[name], (partial(checkpoint.read, name),), (name,))
        for index, kinds in sorted(layers.items())
        for kind, name in sorted(kinds.items())
    }


def projector_sizes(tensors: Mapping[str, Made]) -> tuple[int, int]:
    """Depth, and width of the states that it takes."""
    return len(tensors) // 2, tensors[f"{CONNECTOR}layers.0.weight"].shape[1]


__all__ = ["CONNECTOR", "open_projector", "projector_sizes", "projector_tensors"]
