"""Names and shapes of the tensors in a MoAI checkpoint, at its real sizes or others."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """The defaults are MoAI-7B's."""

    vocabulary: int = 92_544
    hidden: int = 4096
    inner: int = 14_336
    layers: int = 32
    heads: int = 32
    key_value_heads: int = 8
    mixed: tuple[int, ...] = (7, 15, 23, 31)
    rank: int = 64
    latents: int = 64
    compressor_inner: int = 256
    compressor_depth: int = 4
    plora: int = 256
    vision: int = 1024
    vision_inner: int = 4096
    vision_layers: int = 24
    positions: int = 35 * 35 + 1
    patch: int = 14


TINY = Sizes(
    vocabulary=96,
    hidden=32,
    inner=48,
    layers=4,
    heads=4,
    key_value_heads=2,
    mixed=(1, 3),
    rank=8,
    latents=3,
    compressor_inner=16,
    compressor_depth=2,
    plora=4,
    vision=16,
    vision_inner=24,
    vision_layers=2,
    positions=2 * 2 + 1,
    patch=14,
)
CONFIG = {
    "model_type": "internlm",
    "vocab_size": 92_544,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000,
    "rope_scaling": {"type": "dynamic", "factor": 1.0},
    "max_position_embeddings": 32_768,
    "bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "img_size": 490,
    "initializer_range": 0.02,
}
TINY_CONFIG = CONFIG | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "img_size": 28,
    "vision_config": {"num_attention_heads": 2},
}


def shapes(sizes: Sizes = Sizes()) -> dict[str, Shape]:
    hidden = sizes.hidden
    found: dict[str, Shape] = {
        "model.tok_embeddings.weight": (sizes.vocabulary + 1, hidden),
        "model.norm.weight": (hidden,),
        "output.weight": (sizes.vocabulary, hidden),
        "vision_proj.0.weight": (hidden, sizes.vision),
        "vision_proj.0.bias": (hidden,),
        "vision_proj.2.weight": (hidden, hidden),
        "vision_proj.2.bias": (hidden,),
    }
    for layer in range(sizes.layers):
        found |= _layer(f"model.layers.{layer}.", sizes)
        if layer in sizes.mixed:
            found |= _mixer(f"model.layers.{layer}.attention.moai_", sizes)
    return found | _compressor(sizes) | _vision(sizes)


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def tiny_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes(TINY).items()}


def _layer(where: str, sizes: Sizes) -> dict[str, Shape]:
    hidden, inner = sizes.hidden, sizes.inner
    qkv = hidden + 2 * hidden // sizes.heads * sizes.key_value_heads
    found: dict[str, Shape] = {f"{where}{norm}_norm.weight": (hidden,) for norm in ("attention", "ffn")}
    linears = {
        "attention.wqkv": (qkv, hidden),
        "attention.wo": (hidden, hidden),
        "feed_forward.w1": (inner, hidden),
        "feed_forward.w3": (inner, hidden),
        "feed_forward.w2": (hidden, inner),
    }
    for name, (rows, columns) in linears.items():
        found[f"{where}{name}.Plora_main.weight"] = (rows, columns)
        found[f"{where}{name}.Plora_A.weight"] = (sizes.plora, columns)
        found[f"{where}{name}.Plora_B.weight"] = (rows, sizes.plora)
    return found


def _mixer(where: str, sizes: Sizes) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for expert in ("CA_img_aux", "CA_img_lang", "SA_img", "CA_lang_aux", "CA_lang_img", "SA_lang"):
        for projection in "qkvo":
            found[f"{where}{expert}.linear_{projection}.0.weight"] = (sizes.rank, sizes.hidden)
            found[f"{where}{expert}.linear_{projection}.1.weight"] = (sizes.hidden, sizes.rank)
    for gate in ("GA_img", "GA_lang"):
        found |= {f"{where}{gate}.weight": (3, sizes.hidden), f"{where}{gate}.bias": (3,)}
    return found


def _compressor(sizes: Sizes) -> dict[str, Shape]:
    hidden, inner = sizes.hidden, sizes.compressor_inner
    found: dict[str, Shape] = {"moai_compressor.latents": (sizes.latents, hidden)}
    norms = ["moai_compressor.norm"]
    for layer in range(sizes.compressor_depth):
        block = f"moai_compressor.layers.{layer}."
        norms += [f"{block}0.norm_media", f"{block}0.norm_latents", f"{block}1.0"]
        found |= {f"{block}0.to_q.weight": (inner, hidden), f"{block}0.to_kv.weight": (2 * inner, hidden)}
        found[f"{block}0.to_out.weight"] = (hidden, inner)
        found |= {f"{block}1.{number}.weight": (hidden, hidden) for number in (1, 3)}
    return found | {f"{norm}.{name}": (hidden,) for norm in norms for name in ("weight", "bias")}


def _vision(sizes: Sizes) -> dict[str, Shape]:
    width, inner, where = sizes.vision, sizes.vision_inner, "vit.vision_tower.vision_model."
    found: dict[str, Shape] = {
        f"{where}embeddings.class_embedding": (width,),
        f"{where}embeddings.patch_embedding.weight": (width, 3, sizes.patch, sizes.patch),
        f"{where}embeddings.position_embedding.weight": (sizes.positions, width),
    }
    norms = [f"{where}pre_layrnorm", f"{where}post_layernorm"]
    for layer in range(sizes.vision_layers):
        block = f"{where}encoder.layers.{layer}."
        norms += [f"{block}layer_norm1", f"{block}layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {f"{block}self_attn.{name}.weight": (width, width), f"{block}self_attn.{name}.bias": (width,)}
        found |= {f"{block}mlp.fc1.weight": (inner, width), f"{block}mlp.fc1.bias": (inner,)}
        found |= {f"{block}mlp.fc2.weight": (width, inner), f"{block}mlp.fc2.bias": (width,)}
    return found | {f"{norm}.{name}": (width,) for norm in norms for name in ("weight", "bias")}
