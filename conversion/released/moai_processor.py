"""The processor of a MoAI model: CLIP's pixels from stretched pictures, MoAI's prompts, and its aux inputs."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import PILImageResampling

from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.chat_templates_unimoe import MOAI_CHAT_TEMPLATES
from ...processing.processing_unimoe import UniMoeProcessor
from ..dense.picture_processor import image_features

IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


def moai_image_processor(image_size: int) -> Any:
    """Pictures stretched to a square, as the original's benchmarks read them: bilinear, smoothed where they shrink."""
    return transformers.CLIPImageProcessorPil(
        size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BILINEAR,
        do_center_crop=False,
        rescale_factor=1 / 255,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )


def build_moai_processor(config: UniMoeConfig, tokenizer: PreTrainedTokenizerBase) -> UniMoeProcessor:
    """A processor that prepares inputs as MoAI does, pictures of segments included (`aux_maps="released"`)."""
    return UniMoeProcessor(
        image_processor=moai_image_processor(config.vision_config.image_size),
        tokenizer=tokenizer,
        chat_template=dict(MOAI_CHAT_TEMPLATES),
        image_tokens=image_features(config),
        aux_maps="released",
    )


def resized_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """CLIP's table of positions [1 + old * old, C] for a grid of other size, as the original makes it.

    The class token's row stays. The others are resized in float32 and rounded to float16, whatever the table's dtype.
    """
    old = round((len(table) - 1) ** 0.5)
    patches = table[1:].float().T.reshape(1, -1, old, old)
    resized = torch.nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    rows = resized.flatten(2)[0].T.half().to(table.dtype)
    return torch.cat((table[:1], rows))


__all__ = ["IMAGE_MEAN", "IMAGE_STD", "build_moai_processor", "moai_image_processor", "resized_positions"]
