"""Tiny twins: every configuration that the package supports, small enough for a test.

Widths are multiples of 8, which grouped matrix products need.
"""

from typing import Any

import torch
from transformers import CLIPVisionConfig, WhisperConfig

from unimoe import UniMoeBeatsConfig, UniMoeConfig, UniMoeForCausalLM, UniMoeTextConfig

VOCAB_SIZE = 96
IMAGE, VIDEO, AUDIO, SOUND = 92, 93, 94, 95
HIDDEN = 32
MOIIE_GROUPS = {
    "expert_groups": {"vision": [0, 1, 2], "language": [1, 2, 3]},
    "modality_groups": {
        "image": "vision",
        "video": "vision",
        "text": "language",
        "speech": "language",
        "sound": "language",
    },
}


def text_config(**overrides: Any) -> UniMoeTextConfig:
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "num_experts": 4,
        "sparse_layers": [0, 2],
        "router_aux_loss_coef": 0.01,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return UniMoeTextConfig(**{**fields, **overrides})


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        initializer_range=0.2,
    )


def speech_config() -> WhisperConfig:
    return WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=80,
        max_source_positions=50,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.2,
    )


def beats_config() -> UniMoeBeatsConfig:
    return UniMoeBeatsConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        embed_dim=16,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_buckets=32,
        max_distance=64,
    )


def connector(kind: str = "mlp", **overrides: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"type": kind, "input_size": 32, "output_size": HIDDEN}
    if kind == "query_decoder":
        fields |= {"num_tokens": 3, "decoder_config": speech_config().to_dict()}
    elif kind == "qformer":
        sizes = {"hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48}
        fields |= {"num_tokens": 2, "qformer_config": {**sizes, "num_hidden_layers": 2, "num_attention_heads": 4}}
    return {**fields, **overrides}


def config(text: dict[str, Any] | None = None, **overrides: Any) -> UniMoeConfig:
    """All towers: CLIP, Whisper with a query decoder, BEATs with a Q-Former."""
    fields = {
        "text_config": text_config(**(text or {})),
        "vision_config": vision_config(),
        "speech_config": speech_config(),
        "audio_config": beats_config(),
        "image_connector": connector(),
        "speech_connector": connector("query_decoder"),
        "sound_connector": connector("qformer"),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "audio_token_id": AUDIO,
        "sound_token_id": SOUND,
        "video_num_frames": 2,
    }
    return UniMoeConfig(**{**fields, **overrides})


def model(text: dict[str, Any] | None = None, seed: int = 0, **overrides: Any) -> UniMoeForCausalLM:
    torch.manual_seed(seed)
    return UniMoeForCausalLM(config(text, **overrides)).eval()


def media(seed: int = 0, images: int = 0, videos: int = 0, windows: int = 0) -> dict[str, torch.Tensor]:
    """Random media inputs of the tiny towers; audio windows go through both branches."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
    if videos:
        inputs["pixel_values_videos"] = torch.randn(videos, 2, 3, 16, 16, generator=generator)
    if windows:
        inputs["speech_features"] = torch.randn(windows, 80, 100, generator=generator)
        inputs["audio_features"] = torch.randn(windows, 98, 128, generator=generator)
    return inputs


# Placeholders per item: 4 CLIP patches, 4 pooled video positions, 3 speech queries, 2 sound queries.
PLACEHOLDERS = {"image": [IMAGE] * 4, "video": [VIDEO] * 4, "audio": [AUDIO] * 3 + [SOUND] * 2}


def prompt(*pieces: str | int) -> list[int]:
    """Token ids of a prompt; names of media become their placeholders, numbers stay."""
    return [token for piece in pieces for token in (PLACEHOLDERS[piece] if isinstance(piece, str) else [piece])]
