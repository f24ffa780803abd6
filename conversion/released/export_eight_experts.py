"""What the 8-expert variant has beside a base model, written so that its loader ends up with the weights of ours.

    OUT/experts/     the files that experts were tuned in, all empty
    OUT/finetuned/   config.json, mlp_gates.bin, one {expert}_mlp_experts.bin each, connectors, an adapter

The loader lays the tuned-in files over the fine-tuned ones, and two of its six files serve twice. Experts that differ
therefore lie in the fine-tuned files, and the others hold nothing. It wants low-rank pairs and an adapter, too: here
they are zero, because ours are merged.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.llava_keys import PROJECTOR
from ..checkpoints.read_back import save_bin
from ..upcycling.upcycle import FFN_PROJECTIONS
from .unimoe_config import MODALITY_EXPERTS
from .unimoe_experts import EXPERT_FILES, FINETUNED_FILE
from .unimoe_keys import ALIGNER, EXPERTS, GATES
from .unimoe_originals import UniMoeOriginals

# In the names of routers and experts, and of nothing else.
DEEPSPEED_MOE = ".mlp.deepspeed_moe."
_RANK = 1


def eight_expert_fields(text: UniMoeTextConfig) -> dict[str, Any]:
    """Fields of config.json that only this variant has.

    Raises:
        ConversionError: the sparse layers are no multiples of a number, or a loss names modalities unknown there.
    """
    strange = sorted(set(text.modality_experts or {}) - set(MODALITY_EXPERTS))
    if strange:
        raise ConversionError(
            f"The model's modality_experts names {strange}; the original knows {[*MODALITY_EXPERTS]}. Leave the others out."
        )
    losses = {
        "aux_balance_loss": text.router_aux_loss_coef,
        "aux_multimodal_loss": text.router_modality_loss_coef,
        "aux_kl_loss": text.router_divergence_loss_coef,
    }
    return {
        **_sparse_pattern(text),
        "ep_size": 1,
        "capacity_factor": 1.0,
        "lora_r": _RANK,
        "lora_alpha": _RANK,
        "lora_dropout": 0.0,
        "use_fm_block": False,
        **{name: coefficient > 0 for name, coefficient in losses.items()},
        **{f"{name}_coef": coefficient for name, coefficient in losses.items()},
        **{field: (text.modality_experts or {}).get(name, []) for name, field in MODALITY_EXPERTS.items()},
    }


def absent_pairs(originals: UniMoeOriginals) -> dict[str, torch.Tensor]:
    """Zeros for the low-rank pairs of dense layers, which the base's shards hold: the original draws absent ones."""
    pairs: dict[str, torch.Tensor] = {}
    for name in originals.names("model.layers."):
        projection = name.removesuffix(".weight")
        if projection.endswith(tuple(f".mlp.{p}" for p in FFN_PROJECTIONS)):
            info = originals.checkpoint.tensors[originals.ours(name)]
            pairs |= _zero_pair(projection + "_lora_", info.shape, info.dtype)
    return pairs


def write_eight_experts(folder: Path, originals: UniMoeOriginals, fields: dict[str, Any]) -> list[str]:
    """Write both folders; `fields` is config.json. Returns what was written, for a reader."""
    experts, finetuned = folder / "experts", folder / "finetuned"
    experts.mkdir()
    finetuned.mkdir()
    for name in sorted(set(EXPERT_FILES)):
        torch.save({}, experts / name)
    count = originals.config.text_config.num_experts
    for expert in range(count):
        save_bin(_expert(originals, expert), finetuned / FINETUNED_FILE.format(expert=expert))
    gates = [name for name in originals.sources if GATES["deepspeed"] in name]
    save_bin(originals.read_all(gates), finetuned / "mlp_gates.bin")
    projector = originals.read_all(originals.names(PROJECTOR))
    save_bin({f"base_model.model.{n}": t for n, t in projector.items()}, finetuned / "non_lora_trainables.bin")
    aligner = originals.read_all(originals.names("model.query_tokens", ALIGNER))
    save_bin(aligner, finetuned / "mm_audio_aligner.bin")
    _write_empty_adapter(finetuned, originals)
    (finetuned / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [f"finetuned: {len(gates)} routers, {count} experts, connectors, an adapter of zeros; experts: empty files"]


def _sparse_pattern(text: UniMoeTextConfig) -> dict[str, Any]:
    layers, sparse = text.num_hidden_layers, list(text.sparse_layers)
    for stride in range(1, layers + 1):
        if sparse == list(range(0, layers, stride)):
            return {"moe_type": "dense" if stride == 1 else "sparse", "moe_stride": stride}
    raise ConversionError(
        f"The model's sparse layers are {sparse}; the 8-expert variant has experts in every n-th layer, from layer 0 on."
    )


def _expert(originals: UniMoeOriginals, expert: int) -> dict[str, torch.Tensor]:
    """One expert of every layer, in the slot that a process with a single expert has, and pairs of zeros."""
    slot = f".mlp.{EXPERTS['deepspeed']}."
    content: dict[str, torch.Tensor] = {}
    for name in (name for name in originals.sources if f"{slot}{expert}." in name):
        weight = originals.read(name)
        local = name.replace(f"{slot}{expert}.", f"{slot}0.")
        content[local] = weight
        content |= _zero_pair(local.removesuffix(".weight") + "_lora_", tuple(weight.shape), weight.dtype)
    return content


def _write_empty_adapter(folder: Path, originals: UniMoeOriginals) -> None:
    layers = [name for name in originals.names("model.layers.") if name.endswith(".self_attn.q_proj.weight")]
    modules = [name.removesuffix(".weight") for name in layers]
    tensors: dict[str, torch.Tensor] = {}
    for name, module in zip(layers, modules, strict=True):
        info = originals.checkpoint.tensors[originals.ours(name)]
        tensors |= _zero_pair(f"base_model.model.{module}.lora_", info.shape, info.dtype)
    save_bin(tensors, folder / "adapter_model.bin")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": _RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _zero_pair(prefix: str, shape: Iterable[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rows, columns = shape
    return {
        f"{prefix}A.weight": torch.zeros(_RANK, columns, dtype=dtype),
        f"{prefix}B.weight": torch.zeros(rows, _RANK, dtype=dtype),
    }
