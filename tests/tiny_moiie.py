"""Tiny checkpoints as MoIIE's code saves them: random weights under its names, and its config.json."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

HIDDEN, INNER, LAYERS, HEADS, KEY_VALUE_HEADS, VOCABULARY = 32, 48, 4, 4, 2, 96
TOWER = SiglipVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
Tensors = dict[str, torch.Tensor]


def checkpoint(
    root: Path,
    model_type: str,
    *,
    sees: bool = True,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a checkpoint, and beside it the vision tower's folder "siglip"; returns the checkpoint's folder.

    Args:
        config: fields of config.json to change.
    """
    weights, fields = tensors(model_type, **{k: v for k, v in config.items() if k.startswith("num_")})
    if sees:
        scales = 3 if config.get("use_s2") else 1
        tower = save_tower(root / "siglip")
        weights |= projector(16 * scales)
        weights |= {f"model.vision_tower.vision_tower.{name}": value for name, value in tower.items()}
        fields |= {"mm_vision_tower": "../siglip", "unfreeze_vision_tower": True, "image_aspect_ratio": "pad"}
    folder = root / "checkpoint"
    save(folder, {name: value.to(dtype) for name, value in weights.items()}, shards)
    (folder / "config.json").write_text(json.dumps(fields | config))
    return folder


def tensors(model_type: str, **counts: Any) -> tuple[Tensors, dict[str, Any]]:
    """The decoder's tensors and config.json, without what belongs to vision."""
    make = torch.Generator().manual_seed(len(model_type))

    def noise(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=make)

    phi = "phi3" in model_type
    head = HIDDEN // HEADS

    def ffn(where: str) -> Tensors:
        if phi:
            return {
                f"{where}gate_up_proj.weight": noise(2 * INNER, HIDDEN),
                f"{where}down_proj.weight": noise(HIDDEN, INNER),
            }
        shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
        return {f"{where}{name}_proj.weight": noise(*shape) for name, shape in shapes.items()}

    weights = {
        "model.embed_tokens.weight": noise(VOCABULARY, HIDDEN),
        "lm_head.weight": noise(VOCABULARY, HIDDEN),
        "model.norm.weight": 1 + noise(HIDDEN),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}."
        rows = {"q": HIDDEN, "k": KEY_VALUE_HEADS * head, "v": KEY_VALUE_HEADS * head}
        if phi:
            weights[f"{layer}self_attn.qkv_proj.weight"] = noise(sum(rows.values()), HIDDEN)
        else:
            weights |= {f"{layer}self_attn.{name}_proj.weight": noise(count, HIDDEN) for name, count in rows.items()}
        weights[f"{layer}self_attn.o_proj.weight"] = noise(HIDDEN, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{norm}.weight"] = 1 + noise(HIDDEN)
        for where, rows_of_gate in _mlps(model_type, index, counts):
            name = f"{layer}mlp.{where}"
            weights |= {f"{name}weight": noise(rows_of_gate, HIDDEN)} if rows_of_gate else ffn(name)
    config = {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "num_experts_per_tok": 2,
    }
    return weights, config | ({"sliding_window": 63} if phi else {})


def _mlps(model_type: str, layer: int, counts: dict[str, Any]) -> list[tuple[str, int]]:
    """Names below `mlp.` in a layer, with the rows of those that are routers."""
    experts = counts.get("num_experts", 4)
    candidates = int(experts / 2 + experts / 4)
    if layer % 2 == 0 or model_type in ("bunny-phi3", "bunny-llama"):
        return [("", 0)]
    if model_type in ("bunny-phi3-m", "bunny-llama-m"):
        return [("vision_expert.", 0), ("language_expert.", 0)]
    if model_type == "bunny-mm-phi3-moe":
        vision, language = counts["num_vis_experts"], counts["num_lan_experts"]
        pools = [(f"vis_experts.{i}.", 0) for i in range(vision)] + [(f"lan_experts.{i}.", 0) for i in range(language)]
        return [*pools, ("gate_vis.", vision), ("gate.", language)]
    numbered = [(f"experts.{i}.", 0) for i in range(experts)]
    if model_type.endswith("-s"):
        return [*numbered, ("gate.", candidates), ("gate_vis.", candidates)]
    return [*numbered, ("gate.", experts)]


def projector(width: int) -> Tensors:
    make = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (HIDDEN, width), "0.bias": (HIDDEN,), "2.weight": (HIDDEN, HIDDEN), "2.bias": (HIDDEN,)}
    return {f"model.mm_projector.{n}": 0.2 * torch.randn(shape, generator=make) for n, shape in shapes.items()}


def save_tower(folder: Path) -> Tensors:
    """A SigLIP folder; returns its tensors, by names that begin with "vision_model."."""
    torch.manual_seed(3)
    state = SiglipVisionModel(TOWER).state_dict()
    named = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in state.items()}
    folder.mkdir(parents=True)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(TOWER.to_dict()))
    return named


def save(folder: Path, weights: Tensors, shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n].contiguous() for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
