"""The dynamic-capacity block of DCMoE and UniMoE-Audio against golden data: router, experts and auxiliary loss."""

from typing import Any

import pytest
import torch
from balance import load_balancing_loss
from golden import GoldenCase

from unimoe import UniMoeTextConfig
from unimoe.conversion.released.dcmoe_keys import dcmoe_block_tensors, dcmoe_routing_fields
from unimoe.modeling_unimoe.modeling_unimoe_text import UniMoeSparseBlock


def block_configs(case: GoldenCase) -> dict[str, dict[str, Any]]:
    """The folder's blocks by name: entries of config.json that describe one and have an input."""
    return {
        name: fields
        for name, fields in case.config.items()
        if isinstance(fields, dict) and "mlp_dynamic_expert_num" in fields and case.has(f"{name}.input")
    }


@pytest.mark.golden("*.input", weights="*.gate.weight", where=lambda case: bool(block_configs(case)))
@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_dynamic_capacity_block(golden_case: GoldenCase, experts: str) -> None:
    for name, fields in block_configs(golden_case).items():
        block = original_block(golden_case, name, fields)
        block.experts.config._experts_implementation = experts
        first_parts = {tensor.removeprefix(f"{name}.").split(".")[0] for tensor in golden_case.names(f"{name}.*.*")}
        for call in sorted(first_parts):
            check_call(golden_case, name, call, block)


def original_block(case: GoldenCase, name: str, fields: dict[str, Any]) -> UniMoeSparseBlock:
    sizes = {"hidden_size": fields["hidden_size"], "num_attention_heads": 1, "num_hidden_layers": 1}
    config = UniMoeTextConfig(**sizes, hidden_act=fields["hidden_act"], **dcmoe_routing_fields(fields))
    block = UniMoeSparseBlock(config)
    block.load_state_dict(dcmoe_block_tensors(case.weights_under(f"{name}.")))
    return block.eval()


@torch.no_grad()
def check_call(case: GoldenCase, name: str, call: str, block: UniMoeSparseBlock) -> None:
    """One call of the original block: "mask", "nomask" or "mask_auxw" (also with weights of the auxiliary loss)."""
    x_BSH = case.input(f"{name}.input")
    mask_BS = None if call == "nomask" else case.input(f"{name}.attention_mask")
    routing = block.gate.route(x_BSH.flatten(0, 1), None if mask_BS is None else mask_BS.flatten())
    if mask_BS is None:
        token_weight_T = None
    elif call.endswith("_auxw"):
        token_weight_T = (case.input(f"{name}.aux_balance_weight") * mask_BS).flatten()
    else:
        # The original's mean takes padding in when it is given no weights.
        token_weight_T = torch.ones(mask_BS.numel())
    aux_loss = load_balancing_loss(
        (routing.logits_TR,),
        block.experts.config,
        attention_mask_T=None if mask_BS is None else mask_BS.flatten(),
        token_weight_T=token_weight_T,
    )
    for result, actual in (
        ("router_logits", routing.logits_TR),
        ("dynamic_top_k", routing.num_choices_T),
        ("expert_mask", routing.kept_TR.int()),
        ("global_weight", routing.weights_TR),
        ("output", block(x_BSH, None, mask_BS)),
        ("aux_loss", aux_loss),
    ):
        case.check_if_present(f"{name}.{call}.{result}", actual)
