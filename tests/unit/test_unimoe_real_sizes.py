"""The released models' folders at their real sizes, planned in seconds: the files hold every name and shape, no values.

A tensor of one value, expanded, has the shape of 45 million and takes a few bytes of a file.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import released_shapes as real
import torch
from released_shapes import AUDIO_TOWER, FFN, HIDDEN, LAYERS, VISION_TOWER, Shape

from unimoe import UniMoeBeatsConfig
from unimoe.conversion.checkpoints.parameters import count_parameters, total_and_active
from unimoe.conversion.released.import_unimoe import ImportPlan, UniMoeFolders, plan_import
from unimoe.conversion.released.unimoe_experts import EXPERT_FILES

RANK, INNER_RANK = 8, 8
CONFIG = {**real.ORIGINAL, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
EIGHT = {
    "num_experts": 8,
    "moe_type": "dense",
    "moe_stride": 1,
    "lora_r": INNER_RANK,
    "lora_alpha": 16,
    "ep_size": 8,
    "aux_balance_loss": False,
}
EVERY, EVEN = range(LAYERS), range(0, LAYERS, 2)


@pytest.mark.parametrize(
    ("name", "sparse", "total", "active"),
    [
        ("speech", EVERY, 20_254_083_072, 11_597_039_616),
        ("speech_dp", EVEN, 13_761_038_336, 9_432_516_608),
        ("audio", EVEN, 13_748_686_832, 9_420_165_104),
        ("8e", EVERY, 37_568_694_272, 11_597_563_904),
    ],
)
def test_the_folders_of_a_released_model_are_accounted_for(
    tmp_path: Path, name: str, sparse: range, total: int, active: int
) -> None:
    plan = plan_import(folders(tmp_path, name, sparse))
    assert plan.variant.name == name
    assert plan.variant.sparse_layers == tuple(sparse)
    count = total_and_active(count_parameters(plan.config))
    assert (count.total, count.active) == (total, active)
    assert sum(math.prod(output.shape) for output in plan.outputs) == total
    assert {output.dtype for output in plan.outputs} == {torch.float16}
    assert sum(tensor.fate == "unexpected" for tensor in plan.gathered.tensors) == 0
    check_sources(plan, name, sparse)


def check_sources(plan: ImportPlan, name: str, sparse: range) -> None:
    """Every tensor that a file holds is consumed or dropped, and the numbers are those of the layout."""
    by_file: dict[str, dict[str, int]] = {}
    for tensor in plan.gathered.tensors:
        fates = by_file.setdefault(tensor.file, {})
        fates[tensor.fate] = fates.get(tensor.fate, 0) + 1
    attention = 2 * 4 * LAYERS
    if name != "8e":
        # LoRA on attention and on every linear layer of an MLP, the router included; that of routers is lost.
        dense = LAYERS - len(sparse)
        linear = 3 * dense + len(sparse) * 3 * real.EXPERTS
        assert by_file["finetuned/adapter_model.bin"] == {
            "consumed": attention + 2 * linear,
            "dropped": 2 * len(sparse),
        }
        return
    assert by_file["finetuned/adapter_model.bin"] == {"consumed": attention}
    for file in sorted(set(EXPERT_FILES)):
        assert by_file[f"experts/{file}"] == {"consumed": 3 * LAYERS}
    for expert in range(8):
        assert by_file[f"finetuned/{expert}_mlp_experts.bin"] == {"consumed": 6 * LAYERS, "dropped": 3 * LAYERS}
    assert by_file["finetuned/mlp_gates.bin"] == {"consumed": LAYERS}
    # Rotary tables, and the routers and experts of the 4-expert model.
    replaced = 4 + len(real.connector({})) + len(real.speech_aligner()) + 1
    assert by_file["base/pytorch_model.bin"]["dropped"] == LAYERS * (1 + 1 + 3 * real.EXPERTS) + replaced


def folders(root: Path, name: str, sparse: range) -> UniMoeFolders:
    audio = real.sound() if name == "audio" else real.speech()
    towers = {n: s for n, s in {**real.vision(), **audio}.items() if n.startswith((VISION_TOWER, AUDIO_TOWER))}
    connectors = {**real.projector(), **{n: s for n, s in audio.items() if n not in towers}}
    save(root / "base" / "pytorch_model.bin", {**real.decoder(sparse), **connectors})
    config = CONFIG | (EIGHT if name == "8e" else {})
    write_json(root / "base" / "config.json", config)
    write_json(root / "e2" / "config.json", config)
    write_finetuned(root / "e2", name, sparse, connectors)
    clip = {n.removeprefix(VISION_TOWER): s for n, s in towers.items() if n.startswith(VISION_TOWER)}
    save(root / "clip" / "pytorch_model.bin", clip)
    write_json(root / "clip" / "config.json", real.CLIP.to_dict())
    tower = {n.removeprefix(AUDIO_TOWER): s for n, s in towers.items() if n.startswith(AUDIO_TOWER)}
    if name == "audio":
        torch.save({"cfg": UniMoeBeatsConfig().to_original(), "model": expanded(tower)}, root / "beats.pt")
    else:
        save(root / "whisper" / "pytorch_model.bin", {f"model.encoder.{n}": s for n, s in tower.items()})
        write_json(root / "whisper" / "config.json", real.WHISPER.to_dict())
    if name == "8e":
        for file in sorted(set(EXPERT_FILES)):
            ffn = {f"model.layers.{i}.mlp.{n}.weight": s for i in range(LAYERS) for n, s in FFN.items()}
            save(root / "experts" / file, ffn)
    return UniMoeFolders(
        base=root / "base",
        finetuned=root / "e2",
        clip=root / "clip",
        whisper=None if name == "audio" else root / "whisper",
        beats=root / "beats.pt" if name == "audio" else None,
        experts=root / "experts" if name == "8e" else None,
    )


def write_finetuned(folder: Path, name: str, sparse: range, connectors: dict[str, Shape]) -> None:
    projector = {f"base_model.model.{n}": s for n, s in connectors.items() if "mm_projector" in n}
    save(folder / "non_lora_trainables.bin", projector)
    save(folder / "mm_audio_aligner.bin", {n: s for n, s in connectors.items() if "mm_projector" not in n})
    attention: dict[str, Shape] = {
        f"model.layers.{i}.self_attn.{n}_proj": (HIDDEN, HIDDEN) for i in range(LAYERS) for n in "qkvo"
    }
    gate = "deepspeed_moe.gate.wg" if name == "8e" else "gate"
    experts = 8 if name == "8e" else real.EXPERTS
    gates: dict[str, Shape] = {f"model.layers.{i}.mlp.{gate}": (experts, HIDDEN) for i in sparse}
    save(folder / "mlp_gates.bin", {f"{n}.weight": s for n, s in gates.items()})
    adapted = attention if name == "8e" else {**attention, **gates, **plain_ffns(sparse)}
    save(folder / "adapter_model.bin", lora(adapted, "base_model.model.{}.lora_{}.weight", RANK))
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": 16})
    if name == "8e":
        save(folder / "fm_adapter.bin", {})
        slot = "model.layers.{}.mlp.deepspeed_moe.experts.deepspeed_experts.0.{}"
        modules = {slot.format(i, n): shape for i in sparse for n, shape in FFN.items()}
        full = {f"{n}.weight": shape for n, shape in modules.items()}
        for expert in range(8):
            save(folder / f"{expert}_mlp_experts.bin", {**full, **lora(modules, "{}_lora_{}.weight", INNER_RANK)})


def plain_ffns(sparse: range) -> dict[str, Shape]:
    """Linear layers of experts and of dense MLPs."""
    ffns = {f"model.layers.{i}.mlp.{n}": s for i in range(LAYERS) if i not in sparse for n, s in FFN.items()}
    inside = [(i, e) for i in sparse for e in range(real.EXPERTS)]
    return {**ffns, **{f"model.layers.{i}.mlp.experts.{e}.{n}": s for i, e in inside for n, s in FFN.items()}}


def lora(modules: dict[str, Shape], template: str, rank: int) -> dict[str, Shape]:
    factors: dict[str, Shape] = {}
    for name, (rows, columns) in modules.items():
        factors[template.format(name, "A")] = (rank, columns)
        factors[template.format(name, "B")] = (rows, rank)
    return factors


def expanded(shapes: dict[str, Shape]) -> dict[str, torch.Tensor]:
    value = torch.zeros((), dtype=torch.float16)
    return {name: value.expand(shape) for name, shape in shapes.items()}


def save(path: Path, shapes: dict[str, Shape]) -> None:
    path.parent.mkdir(exist_ok=True)
    torch.save(expanded(shapes), path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
