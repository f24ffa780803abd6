"""Tiny image models with towers of several families, for pictures of 32 x 32 pixels."""

from typing import Any

import tiny
import torch
from transformers import MobileNetV2Config, PreTrainedConfig, SiglipVisionConfig

from unimoe import UniMoeForCausalLM
from unimoe.modeling_unimoe.encoding_unimoe import build_tower


def mobile_net() -> MobileNetV2Config:
    return MobileNetV2Config(
        image_size=32, depth_multiplier=0.1, depth_divisible_by=8, min_depth=8, initializer_range=0.3
    )


def siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )


def clip() -> PreTrainedConfig:
    config = tiny.vision_config()
    config.image_size = 32
    return config


def tower_model(vision_config: PreTrainedConfig, **overrides: Any) -> UniMoeForCausalLM:
    """An image model with the given tower; the connector is made to fit what the tower yields for 32 x 32 pixels."""
    layer = overrides.get("vision_feature_layer", -2)
    tower = build_tower(vision_config).eval()
    states = tower(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states[layer]
    width = states.shape[1] if states.dim() == 4 else states.shape[2]
    only_images = {"speech_config": None, "audio_config": None, "speech_connector": None, "sound_connector": None}
    connector = tiny.connector(input_size=width)
    return tiny.model(vision_config=vision_config, image_connector=connector, **only_images, **overrides)


def image_inputs(model: UniMoeForCausalLM, seed: int = 0) -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        tokens = model.get_image_features(pixels).pooler_output.shape[1]
    ids = torch.tensor([[5, *[tiny.IMAGE] * tokens, 6, 7]] * 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
