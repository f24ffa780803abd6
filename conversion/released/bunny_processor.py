"""The processor of a MoIIE model: SigLIP's pixels and Bunny's prompts."""

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import PILImageResampling

from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.chat_templates_unimoe import bunny_chat_template
from ...processing.processing_unimoe import UniMoeProcessor
from ...processing.processor_parts_unimoe import load_image_processor
from ..checkpoints.checkpoint_reader import read_json
from ..dense.picture_processor import image_features

_PREPROCESSOR = "preprocessor_config.json"


def siglip_image_processor(image_size: int = 384) -> Any:
    """SigLIP so400m's settings: stretched to a square of so many pixels, values from -1 to 1."""
    return transformers.SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        rescale_factor=1 / 255,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def build_bunny_processor(
    config: UniMoeConfig,
    tokenizer: PreTrainedTokenizerBase,
    version: str,
    tower: Path | None = None,
    image_aspect_ratio: str = "pad",
) -> UniMoeProcessor:
    """A processor that prepares inputs as MoIIE does.

    Args:
        config: of the model; `vision_scales` asks for pictures as big as the largest scale.
        tokenizer: see `prepare_bunny_tokenizer`.
        version: of Bunny's chat template: "phi3" or "llama".
        tower: the vision tower's folder, whose preprocessor_config.json counts if there is one; else SigLIP's settings.
        image_aspect_ratio: "square" in the authors' stage 1, "pad" in stage 2.
    """
    vision = config.vision_config
    if tower is not None and (tower / _PREPROCESSOR).is_file():
        pictures = load_image_processor(read_json(tower / _PREPROCESSOR), str(tower))
    else:
        pictures = siglip_image_processor(vision.image_size)
    if config.vision_scales is not None:
        side = max(config.vision_scales) * vision.image_size
        pictures.size = {"height": side, "width": side}
    return UniMoeProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        chat_template=bunny_chat_template(version, tokenizer),
        image_tokens=image_features(config),
        image_aspect_ratio=image_aspect_ratio,
    )
