"""A vision encoder of any kind as the vision tower: its configuration, its states, its pictures, its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import AutoConfig, PreTrainedModel

from ...errors import ConversionError
from ...modeling_unimoe.encoding_unimoe import build_tower
from ...processing.processor_parts_unimoe import load_image_processor
from ..checkpoints.checkpoint_reader import Checkpoint
from ..checkpoints.meta_model import BUILDING_ERRORS, first_line
from ..checkpoints.our_folder import READING_ERRORS
from ..dense.encoder_folders import nameless
from ..dense.picture_processor import image_settings
from ..dense.sources import resolve_model_folder
from .composed_part import ComposedPart, left_over, older_names, taken

TOWER = "model.vision_tower."
# A transformer's last but one state is LLaVA's choice; a convolutional net has its features in the last.
_PATCH_LAYER, _MAP_LAYER = -2, -1


@dataclass(frozen=True)
class VisionStates:
    """What of a tower's hidden states the connector reads.

    Args:
        layer: index into the hidden states.
        width: of a state.
        strategy: "patch" where the first position is a class token, to be dropped; "full" where there is none.
    """

    layer: int
    width: int
    strategy: str


@dataclass(frozen=True)
class VisionTower:
    """A vision encoder, its image processor and what is read of its states."""

    part: ComposedPart
    config: Any
    pictures: Any
    states: VisionStates


def open_vision_tower(
    name: str, layer: int | None = None, image_size: int | None = None, scales: Sequence[int] | None = None
) -> VisionTower:
    """Open a folder or Hub id; only headers are read.

    Args:
        layer: see `VisionStates`; None takes the usual one.
        image_size: pixels, see `picture_processor_of`.
        scales: multiples of the tower's size at which it sees every picture (S2); pictures come at the largest of them.

    Raises:
        ConversionError: it holds no vision encoder that transformers has, or its files do not go together.
    """
    folder = resolve_model_folder(name)
    checkpoint, config = Checkpoint(folder), _vision_config(folder)
    tower = _empty_tower(folder, config)
    pictures = picture_processor_of(folder, image_size)
    size = picture_size(pictures)
    states = _states(folder, tower, size, layer)
    if scales is not None:
        _stretch(pictures, max(scales) * size[0])
    expected = {key: tuple(tensor.shape) for key, tensor in tower.state_dict().items()}
    tensors = taken(checkpoint, TOWER, expected, "the vision tower", older_names(tower))
    facts = f"{config.model_type}, states {states.layer} of width {states.width}"
    dropped = left_over(checkpoint, tensors.values(), "not part of the vision encoder")
    part = ComposedPart("vision tower", name, folder, facts, tuple(checkpoint.files), tensors, dropped)
    return VisionTower(part, config, pictures, states)


def picture_processor_of(folder: Path, image_size: int | None = None) -> Any:
    """The image processor that lies with an encoder.

    Args:
        image_size: stretch pictures to a square of so many pixels instead of what the settings say.

    Raises:
        ConversionError: there is none.
    """
    settings = image_settings(folder)
    if settings is None:
        raise ConversionError(
            f"{folder / 'preprocessor_config.json'} is missing: the folder is not complete. Fetch it."
        )
    try:
        pictures = load_image_processor(settings, str(folder))
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ConversionError(f"The image processor of {folder} cannot be made ({first_line(error)}).") from error
    if image_size is not None:
        _stretch(pictures, image_size)
    return pictures


def _stretch(pictures: Any, side: int) -> None:
    """Have an image processor make squares of so many pixels of whole pictures."""
    pictures.size = {"height": side, "width": side}
    pictures.do_resize, pictures.do_center_crop = True, False


def picture_size(pictures: Any) -> tuple[int, int]:
    """Height and width of what an image processor makes of any picture.

    Raises:
        ConversionError: they depend on the picture.
    """
    sizes = set()
    for height, width in ((48, 80), (80, 48)):
        blank = PIL.Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))
        sizes.add(tuple(pictures(images=blank, return_tensors="pt")["pixel_values"].shape[-2:]))
    if len(sizes) != 1:
        raise ConversionError(
            f"The image processor makes pictures of different sizes ({sorted(sizes)}), and every picture must have as many "
            "features as every other: give --image-size N."
        )
    return sizes.pop()


def _vision_config(folder: Path) -> Any:
    """The configuration of the encoder, which may lie inside that of a model with a text half (CLIP, SigLIP)."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except READING_ERRORS as error:
        raise ConversionError(
            f"transformers cannot read the configuration of {folder} ({first_line(error)}). Give a vision encoder of a "
            "class that transformers has."
        ) from error
    return nameless(getattr(config, "vision_config", None) or config)


def _empty_tower(folder: Path, config: Any) -> PreTrainedModel:
    """The encoder on the "meta" device."""
    try:
        with torch.device("meta"):
            tower = build_tower(config)
    except BUILDING_ERRORS as error:
        raise ConversionError(f"No encoder can be built of {folder / 'config.json'} ({first_line(error)}).") from error
    if tower is None or tower.main_input_name != "pixel_values":
        raise ConversionError(
            f"{folder} holds a {config.model_type!r} model, which does not take pictures. Give a vision encoder, e.g. "
            "CLIP, SigLIP, DINOv2 or MobileNetV2."
        )
    return tower.eval()


@torch.no_grad()
def _states(folder: Path, tower: PreTrainedModel, size: tuple[int, int], layer: int | None) -> VisionStates:
    try:
        outputs = tower(torch.zeros(1, 3, *size, device="meta"), output_hidden_states=True, return_dict=True)
    except BUILDING_ERRORS as error:
        raise ConversionError(
            f"The encoder in {folder} does not take pictures of {size[0]} x {size[1]} pixels, which its image processor "
            f"makes ({first_line(error)}). Give --image-size N."
        ) from error
    hidden = getattr(outputs, "hidden_states", None)
    if not hidden:
        raise ConversionError(f"The encoder in {folder} does not give its hidden states, which a connector reads.")
    is_map = hidden[-1].dim() == 4
    layer = (_MAP_LAYER if is_map else _PATCH_LAYER) if layer is None else layer
    if not -len(hidden) <= layer < len(hidden):
        raise ConversionError(
            f"--vision-feature-layer is {layer}, but the encoder in {folder} has {len(hidden)} hidden states."
        )
    chosen = hidden[layer]
    if is_map:
        return VisionStates(layer, chosen.shape[1], "full")
    return VisionStates(layer, chosen.shape[2], _strategy(chosen.shape[1], size, tower.config))


def _strategy(positions: int, size: tuple[int, int], config: Any) -> str:
    """Whether the positions begin with a class token: there is one more of them than patches at least."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):
        return "patch" if positions > (size[0] // patch) * (size[1] // patch) else "full"
    side = round(positions**0.5)
    return "full" if side * side == positions else "patch"


def states_fields(tower: VisionTower) -> Mapping[str, Any]:
    """The fields of `UniMoeConfig` that say what is read."""
    return {
        "vision_config": tower.config,
        "vision_feature_layer": tower.states.layer,
        "vision_feature_select_strategy": tower.states.strategy,
    }


__all__ = ["VisionTower", "open_vision_tower", "picture_processor_of", "picture_size", "states_fields"]
