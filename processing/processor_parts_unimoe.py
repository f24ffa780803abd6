"""The parts of a processor, any of which but the tokenizer may be absent, and how they come back from disk."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import AutoTokenizer

from .auxiliary_inputs_unimoe import AUX_MAPS
from .feature_extraction_unimoe import UniMoeFeatureExtractor
from .media_inputs_unimoe import IMAGE_ASPECT_RATIOS
from .media_policy_unimoe import OptionError, PlaceholderError
from .original_chat_unimoe import TOKENIZATIONS
from .video_processing_unimoe import UniMoeVideoProcessor

PARTS = ("image_processor", "video_processor", "feature_extractor", "tokenizer")


def check_settings(processor: Any) -> None:
    """Raises a PlaceholderError or an OptionError unless a processor's settings are among those that there are."""
    if processor.tokenization not in TOKENIZATIONS:
        raise PlaceholderError(
            f"UniMoeProcessor: tokenization is {processor.tokenization!r}; use one of {TOKENIZATIONS}."
        )
    for name, allowed in (("image_aspect_ratio", IMAGE_ASPECT_RATIOS), ("aux_maps", AUX_MAPS)):
        if getattr(processor, name) not in allowed:
            words = " or ".join(map(repr, allowed))
            raise OptionError(f"UniMoeProcessor: {name} is {getattr(processor, name)!r}; use {words}.")
    if not isinstance(processor.image_antialias, bool):
        raise OptionError(f"UniMoeProcessor: image_antialias is {processor.image_antialias!r}; use true or false.")


class PresentParts:
    """`get_attributes`: of the class all part names, of an instance those that it has."""

    def __get__(self, instance: Any, owner: type) -> Callable[[], list[str]]:
        names = [name for name in PARTS if instance is None or name in instance.__dict__]
        return lambda: names


def load_parts(folder: str, saved: dict[str, Any], **kwargs: Any) -> list[Any]:
    """The parts of a saved processor, in the order of `PARTS`; None for those that `saved` lacks.

    Our own classes are made here rather than looked up by name, which would need them registered, and torchvision.
    """
    own = {"video_processor": UniMoeVideoProcessor, "feature_extractor": UniMoeFeatureExtractor}
    parts = {name: cls_(**saved[name]) for name, cls_ in own.items() if saved.get(name) is not None}
    if saved.get("image_processor") is not None:
        parts["image_processor"] = load_image_processor(saved["image_processor"], folder, **kwargs)
    parts["tokenizer"] = AutoTokenizer.from_pretrained(folder, **kwargs)
    return [parts.get(name) for name in PARTS]


def forget_code_of_processor(*owners: dict[str, Any]) -> None:
    """Undo what saving a processor with its code leaves in it and in its parts; where the parts' own code is stays."""
    for fields in owners:
        if fields.get("auto_map"):
            fields["auto_map"].pop("AutoProcessor", None)
            if not fields["auto_map"]:
                del fields["auto_map"]


def load_image_processor(settings: dict[str, Any], folder: str, **kwargs: Any) -> Any:
    """An image processor on PIL from its saved settings; `folder` and kwargs serve one that is remote code."""
    # By its name where transformers has it: AutoImageProcessor of older versions asks for torchvision.
    pil_class = getattr(transformers, f"{settings.get('image_processor_type')}Pil", None)
    if pil_class is not None:
        return pil_class.from_dict(settings)
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **kwargs)
