"""Names and shapes of the tensors in the released Uni-MoE models, at their real sizes."""

from typing import Any

import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, CLIPVisionConfig, CLIPVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder

from unimoe.conversion.checkpoints.key_rules import Shape
from unimoe.conversion.checkpoints.llava_keys import VISION_TOWER
from unimoe.conversion.released.unimoe_keys import ALIGNER, AUDIO_TOWER

HIDDEN, INNER, VOCABULARY, LAYERS, EXPERTS, QUERIES = 4096, 11_008, 32_000, 32, 4, 50
FFN: dict[str, Shape] = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
ORIGINAL = {"moe": True, "num_experts": EXPERTS, "num_experts_per_tok": 2, "mm_vision_select_layer": -2}
CLIP = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
WHISPER = WhisperConfig(
    d_model=768,
    encoder_layers=12,
    decoder_layers=12,
    encoder_attention_heads=12,
    decoder_attention_heads=12,
    encoder_ffn_dim=3072,
    decoder_ffn_dim=3072,
    vocab_size=51_865,
)


def decoder(sparse: range) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}self_attn.rotary_emb.inv_freq"] = (64,)
        if i in sparse:
            shapes[f"{layer}mlp.gate.weight"] = (EXPERTS, HIDDEN)
            shapes |= {f"{layer}mlp.experts.{e}.{n}.weight": s for e in range(EXPERTS) for n, s in FFN.items()}
        else:
            shapes |= {f"{layer}mlp.{n}.weight": shape for n, shape in FFN.items()}
    return shapes


def projector() -> dict[str, Shape]:
    first: dict[str, Shape] = {"model.mm_projector.0.weight": (HIDDEN, 1024), "model.mm_projector.0.bias": (HIDDEN,)}
    return {**first, "model.mm_projector.2.weight": (HIDDEN, HIDDEN), "model.mm_projector.2.bias": (HIDDEN,)}


def vision() -> dict[str, Shape]:
    tensors = names_of(CLIPVisionModel, CLIP)
    plain = {name.removeprefix("vision_model."): shape for name, shape in tensors.items()}
    return {f"{VISION_TOWER}vision_model.{name}": shape for name, shape in plain.items()}


def speech() -> dict[str, Shape]:
    tower = {AUDIO_TOWER + name: shape for name, shape in names_of(WhisperEncoder, WHISPER).items()}
    return {**tower, "model.query_tokens": (1, QUERIES, 768), **connector(speech_aligner())}


def speech_aligner() -> dict[str, Shape]:
    """The query decoder, by names below the aligner's."""
    return {f"decoder.audio_decoder.{name}": shape for name, shape in names_of(WhisperDecoder, WHISPER).items()}


def sound() -> dict[str, Shape]:
    """BEATs with the names of its own checkpoint, and the default Q-Former."""
    width, inner, heads = 768, 3072, 12
    tower: dict[str, Shape] = {
        "patch_embedding.weight": (512, 1, 16, 16),
        **affine("layer_norm", 512),
        **affine("post_extract_proj", width, 512),
        **affine("encoder.layer_norm", width),
        "encoder.pos_conv.0.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, 128),
        "encoder.pos_conv.0.weight_v": (width, width // 16, 128),
    }
    for i in range(12):
        layer = f"encoder.layers.{i}."
        for name in "qkv":
            tower |= affine(f"{layer}self_attn.{name}_proj", width, width)
        tower |= affine(f"{layer}self_attn.out_proj", width, width) | affine(f"{layer}self_attn.grep_linear", 8, 64)
        tower |= affine(f"{layer}fc1", inner, width) | affine(f"{layer}fc2", width, inner)
        tower |= affine(f"{layer}self_attn_layer_norm", width) | affine(f"{layer}final_layer_norm", width)
        tower[f"{layer}self_attn.grep_a"] = (1, heads, 1, 1)
        tower[f"{layer}self_attn.relative_attention_bias.weight"] = (320, heads)
    qformer = {f"qformer.qformer.{name}": s for name, s in names_of(Blip2QFormerModel, blip2()).items()}
    named = {AUDIO_TOWER + name: shape for name, shape in tower.items()}
    return {**named, **connector({**qformer, "query_tokens": (1, QUERIES, width)})}


def blip2() -> Blip2QFormerConfig:
    return Blip2QFormerConfig(encoder_hidden_size=768)


def connector(parts: dict[str, Shape]) -> dict[str, Shape]:
    return {ALIGNER + name: shape for name, shape in {**parts, **affine("projector", HIDDEN, 768)}.items()}


def affine(name: str, *weight: int) -> dict[str, Shape]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def names_of(model: Any, config: Any) -> dict[str, Shape]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model(config).state_dict().items()}
