"""Names and fields of DCMoE's and UniMoE-Audio's sparse block, in ours.

The original block keeps its gate under `gate`, routed experts under
`dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts.{j}` and shared ones under `fixed_real_moe.{i}`, each with its
own projections. Gate rows are in our order already: routed, null, shared.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ConversionError

_EXPERT_KEY = re.compile(
    r"(?P<kind>dynamic_real_moe\.deepspeed_moe\.experts\.deepspeed_experts|fixed_real_moe)"
    r"\.(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight"
)
_MODULES = {
    "dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts": "experts",
    "fixed_real_moe": "shared_experts",
}
# What the original configuration classes use for fields that a config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "mlp_dynamic_expert_num": 4,
    "mlp_dynamic_null_expert_num": 0,
    "mlp_fixed_expert_num": 2,
    "mlp_dynamic_top_p": 0.7,
    "mlp_dynamic_top_k": 2,
    "dynamic_intermediate_size": 8960,
    "shared_intermediate_size": 8960,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.01,
    "token_drop": False,
    "drop_policy": "probs",
    "min_capacity": 8,
    "capacity_factor": 1.0,
    "l_aux_weight": 0,
    "ignore_differentiable_router": True,
}


def dcmoe_routing_fields(original: Mapping[str, Any]) -> dict[str, Any]:
    """The `UniMoeTextConfig` fields of an original configuration's routing.

    Args:
        original: the fields, which UniMoE-Audio keeps in its text_config. Where and in which precision the original
            runs (ep_size, fp32_gate, ...) is not routing and is ignored.
    """
    fields = {**_DEFAULTS, **original}
    top_p = fields["mlp_dynamic_top_p"]
    return {
        "router_type": "dynamic",
        "num_experts": fields["mlp_dynamic_expert_num"],
        "num_null_experts": fields["mlp_dynamic_null_expert_num"],
        "num_shared_experts": fields["mlp_fixed_expert_num"],
        "moe_intermediate_size": fields["dynamic_intermediate_size"],
        "shared_intermediate_size": fields["shared_intermediate_size"],
        "router_top_p": top_p,
        # With a top_p the original ignores its top_k, which it then often leaves at 0.
        "num_experts_per_tok": fields["mlp_dynamic_top_k"] or (1 if top_p else 0),
        "router_jitter_noise": fields["input_jitter_noise"],
        "router_near_max_band": 2 * fields["router_jitter_noise"],
        "router_pick": "max" if fields["ignore_differentiable_router"] else "sample",
        "expert_capacity_factor": fields["capacity_factor"] if fields["token_drop"] else None,
        "min_expert_capacity": fields["min_capacity"],
        "capacity_policy": fields["drop_policy"],
        "router_aux_loss_coef": fields["l_aux_weight"],
    }


def dcmoe_block_tensors(original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a `UniMoeSparseBlock` from those of an original block.

    Args:
        original: names as inside the original's `mlp`, "gate.weight" and so on.

    Returns:
        "gate.weight" [R, H], "experts.gate_up_proj" [E, 2I, H], "experts.down_proj" [E, H, I] and, with shared
        experts, the same under "shared_experts."; in the original dtypes.

    Raises:
        ConversionError: a name is not one of the block's, or an expert lacks a projection.
    """
    tensors = dict(original)
    if "gate.weight" not in tensors:
        raise ConversionError("A DCMoE block lacks gate.weight: give the tensors inside its mlp, without prefix.")
    converted = {"gate.weight": tensors.pop("gate.weight")}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT_KEY.fullmatch(name)
        if match is None:
            raise ConversionError(
                f"{name} is no tensor of a DCMoE block: expected gate.weight and experts' projections."
            )
        module = experts.setdefault(_MODULES[match["kind"]], {})
        module.setdefault(int(match["expert"]), {})[match["projection"]] = tensor
    for module_name, members in experts.items():
        converted |= _fused(module_name, members)
    return converted


def _fused(module: str, experts: Mapping[int, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    for index in range(max(experts) + 1):
        missing = {"gate", "up", "down"} - set(experts.get(index, {}))
        if missing:
            raise ConversionError(
                f"Expert {index} of a DCMoE block's {module} lacks {sorted(missing)}: is the checkpoint complete?"
            )
    ordered = [experts[index] for index in range(len(experts))]
    return {
        f"{module}.gate_up_proj": torch.stack([torch.cat((e["gate"], e["up"])) for e in ordered]),
        f"{module}.down_proj": torch.stack([e["down"] for e in ordered]),
    }
