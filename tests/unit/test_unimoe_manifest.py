"""The released variants at their real sizes, on the meta device: every name of the original has its place in ours."""

import math
from typing import Any

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, CLIPVisionConfig, CLIPVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder

from unimoe import UniMoeBeatsConfig
from unimoe.conversion.parameters import count_parameters, total_and_active
from unimoe.conversion.sources import expected_tensors
from unimoe.conversion.unimoe_config import Encoders, our_config
from unimoe.conversion.unimoe_keys import ALIGNER, AUDIO_TOWER, VISION_TOWER, KeyMap, Shape, rules_for, vision_prefix
from unimoe.conversion.unimoe_variant import recognise

HIDDEN, INNER, VOCABULARY, LAYERS, EXPERTS, QUERIES = 4096, 11_008, 32_000, 32, 4, 50
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


@pytest.mark.parametrize(
    ("name", "sparse", "total", "active"),
    [
        ("speech", range(LAYERS), 20_254_083_072, 11_597_039_616),
        ("speech_dp", range(0, LAYERS, 2), 13_761_038_336, 9_432_516_608),
        ("audio", range(0, LAYERS, 2), 13_748_686_832, 9_420_165_104),
    ],
)
def test_every_tensor_of_a_released_model_has_its_place(name: str, sparse: range, total: int, active: int) -> None:
    audio = "beats" if name == "audio" else "whisper"
    shapes = {**decoder(sparse), **projector(), **vision(), **(sound() if audio == "beats" else speech())}
    variant = recognise(shapes, ORIGINAL)
    assert variant.name == name
    encoders = Encoders(CLIP, whisper=WHISPER if audio == "whisper" else None, beats=UniMoeBeatsConfig())
    config = our_config(ORIGINAL, variant, encoders, shapes)
    expected = {key: tuple(tensor.shape) for key, tensor in expected_tensors(config).items()}
    mapped = KeyMap(rules_for(audio, vision_prefix(expected))).map(shapes)
    assert not mapped.unexpected
    assert {key: target.shape(shapes) for key, target in mapped.targets.items()} == expected
    placed = sum(len(target.sources) for target in mapped.targets.values())
    assert placed + len(mapped.dropped) == len(shapes)
    count = total_and_active(count_parameters(config))
    assert (count.total, count.active) == (total, active)
    # The same from the original's side: without the copies of BEATs' shared table and the magnitudes of its convolution.
    taken = sum(math.prod(shapes[source]) for target in mapped.targets.values() for source in target.sources)
    assert taken - count.total == (11 * 320 * 12 + 128 if audio == "beats" else 0)
    assert count.total - count.active == len(sparse) * (EXPERTS - 2) * 3 * INNER * HIDDEN


def decoder(sparse: range) -> dict[str, Shape]:
    ffn: dict[str, Shape] = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
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
            shapes |= {f"{layer}mlp.experts.{e}.{n}.weight": s for e in range(EXPERTS) for n, s in ffn.items()}
        else:
            shapes |= {f"{layer}mlp.{n}.weight": shape for n, shape in ffn.items()}
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
    aligner = {f"decoder.audio_decoder.{name}": shape for name, shape in names_of(WhisperDecoder, WHISPER).items()}
    return {**tower, "model.query_tokens": (1, QUERIES, 768), **connector(aligner)}


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
