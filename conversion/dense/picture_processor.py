"""The processor of a model that was converted from one that sees: the source's tokenizer, template and picture settings."""

from pathlib import Path
from typing import Any

from ...processing.chat_templates_unimoe import VICUNA_CHAT_TEMPLATE
from ...processing.chat_unimoe import IMAGE_TOKEN
from ...processing.processing_unimoe import UniMoeProcessor
from ...processing.processor_parts_unimoe import load_image_processor
from ..checkpoints.checkpoint_reader import read_json
from .sources import Source
from .tokenizer_files import tokenizer_if_readable


def picture_processor(source: Source) -> UniMoeProcessor | None:
    """A processor for the pictures of a source; None where it takes none, or its files do not suffice.

    A tokenizer is needed that has `<image>` for pictures, and the settings of the image processor. Without a chat template
    of its own the conversation is LLaVA 1.5's.
    """
    config = source.config
    if source.kind != "multimodal" or config.image_connector is None:
        return None
    settings, tokenizer = image_settings(source.folder), tokenizer_if_readable(source.folder)
    if settings is None or tokenizer is None:
        return None
    if tokenizer.get_vocab().get(IMAGE_TOKEN) != config.image_token_id:
        return None
    return UniMoeProcessor(
        image_processor=load_image_processor(settings, str(source.folder)),
        tokenizer=tokenizer,
        chat_template=_chat_template(source.folder) or tokenizer.chat_template or VICUNA_CHAT_TEMPLATE,
        image_tokens=image_features(config),
    )


def image_features(config: Any) -> int:
    """Features, and so placeholders, of one picture before CLIP or SigLIP."""
    vision = config.vision_config
    has_class_token = vision.model_type == "clip_vision_model"
    patches = (vision.image_size // vision.patch_size) ** 2 + has_class_token
    return patches - (config.vision_feature_select_strategy == "patch")


def image_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the image processor, from a file of their own or from the processor's."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor")
    return None


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return read_json(folder / "chat_template.json").get("chat_template")
    return None


__all__ = ["image_features", "image_settings", "picture_processor"]
