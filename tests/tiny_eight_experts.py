"""Tiny models in the folders of Uni-MoE's 8-expert variant: base, expert files, fine-tuned files by DeepSpeed's names."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tiny_unimoe import Released, base_weights, released

from unimoe.conversion.released.unimoe_experts import EXPERT_FILES

LAYERS, SPARSE, EXPERTS = 3, (0, 2), 8
RANK, ALPHA, PEFT_RANK, PEFT_ALPHA = 2, 8, 3, 6
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PEFT = "base_model.model."


@dataclass(frozen=True)
class EightExperts:
    """`source` has the folders; `weights` are the original's, by its names, after everything is loaded and merged."""

    source: Released
    weights: dict[str, torch.Tensor]


def eight_experts(root: Path, *, inner_adapter: bool = False, **config: Any) -> EightExperts:
    """Write the folders.

    Args:
        inner_adapter: fine-tune the MLP of the dense layer and its low-rank pair too, which no file holds.
        config: fields of config.json to change; `num_experts` and `moe_type` change the files as well.
    """
    fields = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_type": "sparse", "moe_stride": 2} | config
    source = released(root, finetuned=False, text={"sparse_layers": list(SPARSE)})
    base = source.folders.base
    e2, experts = base.parent / "e2", base.parent / "experts"
    e2.mkdir()
    experts.mkdir()
    fields |= {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "ep_size": 1, "capacity_factor": 1.0}
    original = json.loads((base / "config.json").read_text()) | fields
    for folder in (base, e2):
        (folder / "config.json").write_text(json.dumps(original))
    weights = base_weights(base)
    noise = _Noise(weights)
    layers = range(LAYERS) if fields["moe_type"] == "dense" else SPARSE
    merged = {name: t for name, t in weights.items() if ".mlp.experts." not in name and ".mlp.gate." not in name}
    for layer in layers:
        for projection in PROJECTIONS:
            merged.pop(f"model.layers.{layer}.mlp.{projection}.weight", None)
    merged |= _write_experts(experts, e2, noise, fields["num_experts"], layers)
    merged |= _write_finetuned(e2, noise, merged, fields["num_experts"], layers, inner_adapter)
    folders = replace(source.folders, finetuned=e2, experts=experts)
    return EightExperts(replace(source, folders=folders), merged)


class _Noise:
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.generator = torch.Generator().manual_seed(8)
        up = weights[f"model.layers.{LAYERS - 2}.mlp.up_proj.weight"].shape
        self.shapes = {"gate_proj": up, "up_proj": up, "down_proj": up[::-1]}

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * 0.3


def _write_experts(
    experts: Path, e2: Path, noise: _Noise, num_experts: int, layers: range | tuple[int, ...]
) -> dict[str, torch.Tensor]:
    files = {name: _ffn(noise) for name in sorted(set(EXPERT_FILES))}
    for name, content in files.items():
        torch.save(content, experts / name)
    merged = {}
    for expert in range(num_experts):
        content, full = {}, files[EXPERT_FILES[expert % len(EXPERT_FILES)]]
        for layer in layers:
            slot = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts."
            for projection, (rows, columns) in noise.shapes.items():
                a, b = noise(RANK, columns), noise(rows, RANK)
                content[f"{slot}0.{projection}_lora_A.weight"] = a
                content[f"{slot}0.{projection}_lora_B.weight"] = b
                weight = full[f"model.layers.{layer}.mlp.{projection}.weight"]
                content[f"{slot}0.{projection}.weight"] = weight.half().float()  # rounded: the expert's file wins
                merged[f"{slot}{expert}.{projection}.weight"] = weight + ALPHA / RANK * (b @ a)
        torch.save(content, e2 / f"{expert}_mlp_experts.bin")
    return merged


def _ffn(noise: _Noise) -> dict[str, torch.Tensor]:
    """One tuned dense FFN of every layer, the form of the expert files."""
    return {
        f"model.layers.{layer}.mlp.{projection}.weight": noise(*shape)
        for layer in range(LAYERS)
        for projection, shape in noise.shapes.items()
    }


def _write_finetuned(
    e2: Path,
    noise: _Noise,
    merged: dict[str, torch.Tensor],
    num_experts: int,
    layers: range | tuple[int, ...],
    inner_adapter: bool,
) -> dict[str, torch.Tensor]:
    hidden = noise.shapes["up_proj"][1]
    gates = {f"model.layers.{i}.mlp.deepspeed_moe.gate.wg.weight": noise(num_experts, hidden) for i in layers}
    projector = {n: noise(*t.shape) for n, t in merged.items() if n.startswith("model.mm_projector.")}
    queries = {n: noise(*t.shape) for n, t in merged.items() if n == "model.query_tokens"}
    aligner = {n: t for n, t in merged.items() if n.startswith("model.mm_audio_aligner.")} | queries
    torch.save(gates, e2 / "mlp_gates.bin")
    torch.save({_PEFT + name: tensor for name, tensor in projector.items()}, e2 / "non_lora_trainables.bin")
    torch.save(aligner, e2 / "mm_audio_aligner.bin")
    torch.save({}, e2 / "fm_adapter.bin")
    adapted = [
        n for n in merged if n.startswith("model.layers.") and ".self_attn." in n and n.endswith("_proj.weight")
    ]
    changed, adapter = {}, {}
    for name in adapted:
        changed[name] = merged[name] + _lora(adapter, noise, name.removesuffix(".weight"), *merged[name].shape)
    if inner_adapter:
        for projection, (rows, columns) in noise.shapes.items():
            module = f"model.layers.1.mlp.{projection}"
            own = _lora(adapter, noise, module, rows, columns)
            a = _lora(adapter, noise, f"{module}_lora_A", RANK, columns)
            b = _lora(adapter, noise, f"{module}_lora_B", rows, RANK)
            changed[f"{module}.weight"] = merged[f"{module}.weight"] + own + ALPHA / RANK * (b @ a)
    torch.save(adapter, e2 / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": PEFT_RANK, "lora_alpha": PEFT_ALPHA, "bias": "none", "fan_in_fan_out": False}
    (e2 / "adapter_config.json").write_text(json.dumps(config))
    return {**gates, **projector, **queries, **changed}


def _lora(adapter: dict[str, torch.Tensor], noise: _Noise, module: str, rows: int, columns: int) -> torch.Tensor:
    """Put LoRA of a module into the adapter; returns what it adds to the weight."""
    a, b = noise(PEFT_RANK, columns), noise(rows, PEFT_RANK)
    adapter[f"{_PEFT}{module}.lora_A.weight"], adapter[f"{_PEFT}{module}.lora_B.weight"] = a, b
    return PEFT_ALPHA / PEFT_RANK * (b @ a)
