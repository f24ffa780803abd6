"""What vision towers from published weights share: nothing may be missing, and a file says how to prepare pictures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PartError

if TYPE_CHECKING:
    import torch


def load_whole(model: "torch.nn.Module", state: "dict[str, torch.Tensor]", name: str) -> None:
    """Load all weights of a model. Raises PartError, which calls it `name`, where they do not fit, or some are missing."""
    try:
        outcome = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise PartError(f"The weights do not fit {name} ({error}).") from error
    missing = [key for key in outcome.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or outcome.unexpected_keys:
        raise PartError(
            f"The weights do not make a whole {name}: missing {missing}, not known {outcome.unexpected_keys}."
        )


def write_image_processor(target: Path, name: str, image_size: int, mean: float, std: float, **extra: bool) -> None:
    """Write preprocessor_config.json: resize to a square, no crop, scale to 0..1, then (x - mean) / std.

    Written by hand because transformers makes this class only where torchvision is installed; without it
    AutoImageProcessor picks the Pillow class of the same name from this file.
    """
    size = {"height": image_size, "width": image_size}
    settings = {
        "image_processor_type": name,
        "do_resize": True,
        "size": size,
        "resample": 2,  # bilinear
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * 3,
        "image_std": [std] * 3,
    } | extra
    (target / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
