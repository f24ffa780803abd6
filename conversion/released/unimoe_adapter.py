"""LoRA of the original, per expert, as one PEFT adapter for the fused experts of ours.

PEFT adapts a fused tensor [E, out, in] through A [r * E, in], experts one after the other, and B [out, r * E], expert
by expert within each rank. Gate and up projection of an expert have factors of their own in the original; fused, they
make one adapter of twice the rank whose B is block-diagonal.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..checkpoints.key_rules import KeyMap, Place
from ..checkpoints.read_back import require_equal_file
from .unimoe_keys import AudioKind, Layout, rules_for
from .unimoe_lora import Lora, MergedFactor

_FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_PREFIX = "base_model.model."


def require_one_lora_each(loras: Mapping[str, Sequence[Lora]]) -> None:
    """Raises ConversionError for weights that PEFT cannot adapt exactly as the original does."""
    for original, several in loras.items():
        what = f"is changed by {len(several)} pairs of factors" if len(several) > 1 else ""
        if any(isinstance(factor, MergedFactor) for lora in several for factor in lora.tensors):
            what = "has factors that are changed by LoRA themselves"
        if what:
            raise ConversionError(f"{original} {what}, which one adapter cannot hold: convert without --keep-lora.")


def write_adapter(
    folder: Path,
    config: UniMoeConfig,
    loras: Mapping[str, Sequence[Lora]],
    base_name: str,
    folder_name: str,
    layout: Layout,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors and a card.

    Args:
        loras: original name of a weight -> its one LoRA.
        base_name: what the adapter calls its base model.
        folder_name: what its card calls the adapter; the folder is renamed when it is complete.

    Raises:
        ConversionError: the adapter cannot be expressed for fused experts.
    """
    audio: AudioKind = "whisper" if config.speech_connector is not None else "beats"
    key_map = KeyMap(rules_for(audio, "model.vision_tower.", layout))
    places = {original: key_map.place(original) for original in loras}
    fused: dict[str, dict[str, Lora]] = {}
    for original, (lora,) in loras.items():
        fused.setdefault(places[original].target, {})[original] = lora
    adapter_config = _adapter_config(fused, base_name)
    names = _peft_names(config, adapter_config)
    tensors: dict[str, torch.Tensor] = {}
    for target, members in fused.items():
        if target not in names:
            raise ConversionError(f"PEFT finds no module for the LoRA of {target}: convert without --keep-lora.")
        a, b = _factors(members, places, config.text_config.num_experts)
        tensors |= {f"{names[target]}.lora_A.weight": a, f"{names[target]}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    require_equal_file(folder / "adapter_model.safetensors", tensors)
    content = json.dumps(adapter_config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(content, encoding="utf-8")
    (folder / "README.md").write_text(_card(base_name, folder_name), encoding="utf-8")


def adapter_use(base_name: str, adapter_name: str) -> str:
    """How the model and its adapter are put together again, for the cards of both."""
    return f"""\
`{base_name}` without the adapter is the base model with the released routers and connectors, not the released model:
load both.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base_name}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{adapter_name}")
```

Fused experts have adapters of other ranks than single matrices. PEFT warns that `rank_pattern` and `alpha_pattern`
keys "did not match any targeted module and were ignored": it looks for their names among modules only, and does apply
them to the experts' parameters. `model.merge_and_unload().save_pretrained(...)` merges the adapter for good."""


def _card(base_name: str, adapter_name: str) -> str:
    fields = {"library_name": "peft", "license": "other", "base_model": base_name, "tags": ["lora", "unimoe"]}
    metadata = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *metadata, "---", "", f"# {adapter_name}", "", adapter_use(base_name, adapter_name), ""])


def _adapter_config(fused: Mapping[str, Mapping[str, Lora]], base_name: str) -> dict[str, Any]:
    ranks, alphas = {}, {}
    for target, members in fused.items():
        lora = next(iter(members.values()))
        parts = 2 if target.endswith(_FUSED[0]) else 1
        # PEFT looks patterns up by the end of a name; all layers are alike.
        name = re.sub(r"^.*\.layers\.\d+\.", "", target).removesuffix(".weight")
        ranks[name] = parts * lora.a.info.shape[0]
        alphas[name] = lora.scale * ranks[name]
    common = min(ranks, key=lambda name: ranks[name])  # the patterns name all that differ from it
    rank, alpha = ranks[common], alphas[common]
    modules = [target.removesuffix(".weight") for target in fused if target.endswith(".weight")]
    parameters = [name for name in _FUSED if any(target.endswith(name) for target in fused)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,  # PEFT cannot drop inputs of fused tensors
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters or None,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _peft_names(config: UniMoeConfig, adapter_config: Mapping[str, Any]) -> dict[str, str]:
    """Our tensor -> the module that PEFT keeps its factors under, asked of PEFT itself on a model without memory."""
    from peft import LoraConfig, get_peft_model

    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    settings = {k: v for k, v in adapter_config.items() if k not in ("peft_type", "base_model_name_or_path")}
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT looks for the patterns' names among modules only; it does apply them to parameters.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*", category=RuntimeWarning)
        model: PreTrainedModel = UniMoeForCausalLM(UniMoeConfig(**fields))
        adapted = get_peft_model(model, LoraConfig(**settings))
    names = {}
    for name, module in adapted.named_modules():
        if not getattr(module, "lora_A", None):
            continue
        ours = name.removeprefix(_PREFIX)
        while ours.endswith(".base_layer"):  # wrappers of two tensors of one module lie in each other
            ours = ours.removesuffix(".base_layer")
        names[f"{ours}.{getattr(module, 'parameter_name', 'weight')}"] = name
    return names


def _factors(
    members: Mapping[str, Lora], places: Mapping[str, Place], experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in PEFT's layout; where an expert has no LoRA its factors are zero."""
    first = next(iter(members))
    if places[first].rule.how != "expert":
        return members[first].a.read(), members[first].b.read()
    parts = places[first].rule.parts
    rank, width = members[first].a.info.shape
    rows = members[first].b.info.shape[0]
    dtype = members[first].a.info.dtype
    a = torch.zeros(experts, parts * rank, width, dtype=dtype)
    b = torch.zeros(experts, parts * rows, parts * rank, dtype=dtype)
    for original, lora in members.items():
        expert, part = places[original].slot
        ranks = slice(part * rank, (part + 1) * rank)
        a[expert, ranks] = lora.a.read()
        b[expert, part * rows : (part + 1) * rows, ranks] = lora.b.read()
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()
