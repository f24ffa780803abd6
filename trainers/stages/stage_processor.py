"""The processor that a stage trains with: the model's, in other settings if the stage has any."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, RecipeError
from ..recipe.recipe import StageConfig


def open_processor(folder: str) -> Any:
    """The processor of a model's folder. Raises CheckpointError where its files are missing or do not load."""
    from ...processing.processing_unimoe import UniMoeProcessor

    try:
        return UniMoeProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"The processor of {folder} cannot be loaded ({reason}): save it beside the model with "
            "processor.save_pretrained."
        ) from error


def confined(processor: Any, media_root: str | Path | None) -> Any:
    """The processor itself, or a copy that opens no file outside of `media_root`, wherever symbolic links lead."""
    if media_root is None:
        return processor
    own = copy.copy(processor)
    own.media_policy = dataclasses.replace(processor.media_policy, media_root=str(Path(media_root).absolute()))
    return own


def processor_of(stage: StageConfig, processor: Any) -> Any:
    """The processor itself, or a copy with the stage's chat template and shape of pictures; parts are shared.

    Raises:
        RecipeError: the processor has no chat template of that name.
    """
    if stage.chat_template is None and stage.image_aspect_ratio is None:
        return processor
    own = copy.copy(processor)
    if stage.chat_template is not None:
        named = processor.chat_template if isinstance(processor.chat_template, dict) else {}
        if stage.chat_template not in named:
            raise RecipeError(
                f"The stage {stage.name!r} has chat_template {stage.chat_template!r}, but the model's processor has "
                f"{f'those named {sorted(named)}' if named else 'one only, without a name'}."
            )
        own.chat_template = named[stage.chat_template]
    if stage.image_aspect_ratio is not None:
        own.image_aspect_ratio = stage.image_aspect_ratio
    return own
