"""MoIIE on Phi-3-mini and Llama-3-8B at their real sizes: every name of the original has its place, and counts agree.

The files hold every name and shape, no values: a tensor of one value, expanded, takes a few bytes.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from unimoe.conversion.checkpoints.parameters import count_parameters
from unimoe.conversion.released.import_moiie import plan_moiie
from unimoe.conversion.released.moiie_variant import MODEL_TYPES

Shape = tuple[int, ...]
LAYERS = 32
TOWER = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
PHI3 = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "vocab_size": 32_064,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 32_000,
    "pad_token_id": 32_000,
}
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
ROUTING = {"num_hidden_layers": LAYERS, "num_experts": 4, "num_experts_per_tok": 2}
# Parameters of the language model, in all and active per token; a modality model's routers, without a choice, are ours.
MODELS = [
    ("bunny-phi3", 3_821_079_552, 3_821_079_552),
    ("bunny-phi3-m", 5_029_137_408, 3_821_177_856),
    ("bunny-phi3-moe", 7_445_154_816, 5_029_235_712),
    ("bunny-mm-phi3-moe-s", 7_445_253_120, 5_029_334_016),
    ("bunny-mm-phi3-moe", 12_277_189_632, 5_029_432_320),
    ("bunny-llama", 8_030_261_248, 8_030_261_248),
    ("bunny-llama-m", 10_848_964_608, 8_030_392_320),
    ("bunny-llama3-moe", 16_486_240_256, 10_849_095_680),
    ("bunny-mm-llama3-moe-s", 16_486_371_328, 10_849_226_752),
]


@pytest.mark.parametrize(("model_type", "total", "active"), MODELS, ids=[model[0] for model in MODELS])
def test_every_tensor_of_a_real_model_has_its_place(tmp_path: Path, model_type: str, total: int, active: int) -> None:
    use_s2 = model_type.endswith("-s")
    shapes = {**decoder(model_type), **projector(model_type, 3456 if use_s2 else 1152), **tower()}
    config = (PHI3 if "phi3" in model_type else LLAMA) | ROUTING | {"model_type": model_type, "use_s2": use_s2}
    write(tmp_path / "checkpoint", shapes, config)
    write(tmp_path / "siglip", {}, TOWER.to_dict())
    plan = plan_moiie(str(tmp_path / "checkpoint"), vision_tower=str(tmp_path / "siglip"))
    assert (plan.variant.kind, plan.variant.backbone) == MODEL_TYPES[model_type][:2]
    assert {tensor.fate for tensor in plan.gathered.tensors} == {"consumed"}
    assert len(plan.gathered.tensors) == len(shapes)
    counts = count_parameters(plan.config)
    own = [count for role, count in counts.items() if role not in ("towers", "connectors")]
    assert sum(count.total for count in own) == total
    assert sum(count.active for count in own) == active
    written = {output.name: math.prod(output.shape) for output in plan.outputs}
    made = sum(size for name, size in written.items() if name not in plan.targets)
    assert made == (16 * 2 * config["hidden_size"] if plan.variant.kind == "modality" else 0)
    assert sum(written.values()) - made == sum(math.prod(shape) for shape in shapes.values())
    assert plan.config.vision_scales == ([1, 2, 3] if use_s2 else None)


def decoder(model_type: str) -> dict[str, Shape]:
    sizes = PHI3 if "phi3" in model_type else LLAMA
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    phi = "phi3" in model_type
    key_value = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    ffn: dict[str, Shape] = {"down_proj": (hidden, inner)}
    ffn |= {"gate_up_proj": (2 * inner, hidden)} if phi else {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    attention: dict[str, Shape] = {"o_proj": (hidden, hidden)}
    if phi:
        attention["qkv_proj"] = (hidden + 2 * key_value, hidden)
    else:
        attention |= {"q_proj": (hidden, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden)}
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in attention.items()}
        modules, gates = mlps(model_type, i)
        shapes |= {f"{layer}mlp.{m}{name}.weight": shape for m in modules for name, shape in ffn.items()}
        shapes |= {f"{layer}mlp.{gate}.weight": (rows, hidden) for gate, rows in gates.items()}
    return shapes


def mlps(model_type: str, layer: int) -> tuple[list[str], dict[str, int]]:
    """What comes before an FFN's names below `mlp.`, and the rows of the routers."""
    kind = MODEL_TYPES[model_type][0]
    four = range(4)
    if layer % 2 == 0 or kind == "dense":
        return [""], {}
    if kind == "modality":
        return ["vision_expert.", "language_expert."], {}
    if kind == "vanilla":
        return [f"experts.{i}." for i in four], {"gate": 4}
    if kind == "moiie":
        return [f"experts.{i}." for i in four], {"gate": 3, "gate_vis": 3}
    pools = [f"{pool}.{i}." for pool in ("vis_experts", "lan_experts") for i in four]
    return pools, {"gate": 4, "gate_vis": 4}


def projector(model_type: str, width: int) -> dict[str, Shape]:
    hidden = (PHI3 if "phi3" in model_type else LLAMA)["hidden_size"]
    shapes = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {f"model.mm_projector.{name}": shape for name, shape in shapes.items()}


def tower() -> dict[str, Shape]:
    with torch.device("meta"):
        state = SiglipVisionModel(TOWER).state_dict()
    below = "model.vision_tower.vision_tower.vision_model."
    return {below + name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in state.items()}


def write(folder: Path, shapes: dict[str, Shape], config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shapes:
        value = torch.zeros((), dtype=torch.bfloat16)
        torch.save({name: value.expand(shape) for name, shape in shapes.items()}, folder / "pytorch_model.bin")
