"""Fields and tensors of an original DCMoE block, and what is refused."""

from typing import Any

import pytest
import torch

from unimoe import UniMoeTextConfig
from unimoe.conversion.released.dcmoe_keys import dcmoe_block_tensors, dcmoe_routing_fields
from unimoe.errors import ConfigurationError, ConversionError

ROUTED = "dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts"
SIZES = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}


def original_tensors() -> dict[str, torch.Tensor]:
    tensors = {"gate.weight": torch.randn(5, 8)}
    for module, count, width in ((ROUTED, 11, 6), ("fixed_real_moe", 2, 4)):
        # Written backwards: "10" sorts before "2" as text, and the order of a file means nothing.
        for expert in reversed(range(count)):
            for projection in ("gate", "up"):
                tensors[f"{module}.{expert}.{projection}_proj.weight"] = torch.randn(width, 8)
            tensors[f"{module}.{expert}.down_proj.weight"] = torch.randn(8, width)
    return tensors


def test_every_expert_finds_its_place() -> None:
    original = original_tensors()
    ours = dcmoe_block_tensors(original)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        "gate.weight": (5, 8),
        "experts.gate_up_proj": (11, 12, 8),
        "experts.down_proj": (11, 8, 6),
        "shared_experts.gate_up_proj": (2, 8, 8),
        "shared_experts.down_proj": (2, 8, 4),
    }
    for expert in range(11):
        gate, up = ours["experts.gate_up_proj"][expert].chunk(2)
        assert torch.equal(gate, original[f"{ROUTED}.{expert}.gate_proj.weight"])
        assert torch.equal(up, original[f"{ROUTED}.{expert}.up_proj.weight"])
        assert torch.equal(ours["experts.down_proj"][expert], original[f"{ROUTED}.{expert}.down_proj.weight"])


@pytest.mark.parametrize(
    ("lost", "added", "said"),
    [
        ("gate.weight", None, "gate.weight"),
        (f"{ROUTED}.3.up_proj.weight", None, r"Expert 3 .* lacks \['up'\]"),
        (None, "mlp.gate.weight", "mlp.gate.weight"),
        (None, f"{ROUTED}.0.gate_proj.bias", "gate_proj.bias"),
        (None, "fixed_real_moe.5.up_proj.weight", r"Expert 2 .* shared_experts"),
    ],
)
def test_blocks_that_are_not_complete_are_refused(lost: str | None, added: str | None, said: str) -> None:
    tensors = original_tensors()
    tensors.pop(lost or "", None)
    if added:
        tensors[added] = torch.zeros(4, 8)
    with pytest.raises(ConversionError, match=said):
        dcmoe_block_tensors(tensors)


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ({}, {"num_experts": 4, "num_null_experts": 0, "num_shared_experts": 2, "router_top_p": 0.7}),
        ({"mlp_dynamic_top_p": 0, "mlp_dynamic_top_k": 3}, {"router_top_p": 0, "num_experts_per_tok": 3}),
        ({"mlp_dynamic_top_k": 0}, {"num_experts_per_tok": 1, "max_choices_per_token": 3}),
        ({"router_jitter_noise": 0.2}, {"router_near_max_band": 0.4, "router_jitter_noise": 0.01}),
        ({"input_jitter_noise": 0.2}, {"router_near_max_band": 0.02, "router_jitter_noise": 0.2}),
        ({"capacity_factor": 3}, {"expert_capacity_factor": None}),
        ({"token_drop": True, "capacity_factor": 3}, {"expert_capacity_factor": 3, "min_expert_capacity": 8}),
        ({"ignore_differentiable_router": False}, {"router_pick": "sample"}),
        ({"l_aux_weight": 0.025, "ep_size": 4}, {"router_aux_loss_coef": 0.025}),
    ],
)
def test_fields_of_the_routing(original: dict[str, Any], ours: dict[str, Any]) -> None:
    config = UniMoeTextConfig(**SIZES, **dcmoe_routing_fields(original))
    assert config.router_type == "dynamic"
    for field, value in ours.items():
        assert getattr(config, field) == value, field


def test_a_router_without_choices_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_experts_per_tok is 0"):
        UniMoeTextConfig(**SIZES, **dcmoe_routing_fields({"mlp_dynamic_top_p": 0, "mlp_dynamic_top_k": 0}))
