"""Null and shared experts with every router and every experts backend."""

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

from unimoe.modeling_unimoe.modeling_unimoe_text import UniMoeExperts, UniMoeSparseBlock, UniMoeTextModel

TOKENS, NOBODY = 40, 4
EXTRAS = {"num_null_experts": 2, "num_shared_experts": 2, "shared_intermediate_size": 24}
ROUTERS: dict[str, dict[str, Any]] = {
    "top-k": EXTRAS,
    "top-k, not normalised": {**EXTRAS, "norm_topk_prob": False},
    "sigmoid": {**EXTRAS, "router_scoring": "sigmoid"},
    "groups": {**EXTRAS, **tiny.MOIIE_GROUPS},
    "dynamic": {**EXTRAS, "router_type": "dynamic", "router_top_p": 0.7},
    "dynamic top-k": {**EXTRAS, "router_type": "dynamic"},
    "dynamic with capacity": {
        **EXTRAS,
        "router_type": "dynamic",
        "router_top_p": 0.7,
        "expert_capacity_factor": 0.5,
        "min_expert_capacity": 1,
        "capacity_policy": "position",
    },
}
any_router = pytest.mark.parametrize("name", ROUTERS)


def block(name: str) -> UniMoeSparseBlock:
    torch.manual_seed(0)
    model = UniMoeTextModel(tiny.text_config(num_hidden_layers=1, sparse_layers=[0], **ROUTERS[name]))
    return model.layers[0].mlp.eval()


def hidden() -> torch.Tensor:
    return torch.randn(TOKENS, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))


def groups_of_tokens(name: str) -> torch.Tensor | None:
    return torch.arange(TOKENS) % 2 if name == "groups" else None


def expert_output(experts: UniMoeExperts, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    return experts.down_proj[expert] @ (F.silu(gate) * up)


@pytest.mark.parametrize("name", ["top-k", "top-k, not normalised", "sigmoid", "groups"])
def test_columns_of_a_top_k_token(name: str) -> None:
    """Two choices among the group's experts and the null ones, then the shared experts."""
    layer, x, groups = block(name), hidden(), groups_of_tokens(name)
    logits, weights, index = layer.gate(x, groups)
    rows_per_group = 5 if name == "groups" else 6
    empty = 0
    for token in range(TOKENS):
        group = 0 if groups is None else int(groups[token])
        experts = [*layer.gate.groups[group].experts, NOBODY, NOBODY]
        own = logits[token, group * rows_per_group :][:rows_per_group]
        seen = torch.cat((own, logits[token, -2:]))
        scores = seen.sigmoid() if name == "sigmoid" else seen.softmax(-1)
        best = sorted(range(rows_per_group), key=lambda row: -own[row].item())[:2]
        assert index[token].tolist() == [experts[best[0]], experts[best[1]], NOBODY + 1, NOBODY + 2]
        expected = scores[[*best, -2, -1]]
        if name != "top-k, not normalised":
            expected = expected / expected.sum()
        expected = expected * (index[token] != NOBODY)
        torch.testing.assert_close(weights[token], expected)
        empty += int((index[token] == NOBODY).sum())
    assert empty


@any_router
def test_the_block_is_the_weighted_sum_of_the_experts_that_exist(name: str) -> None:
    layer, x, groups = block(name), hidden(), groups_of_tokens(name)
    _, weights, index = layer.gate(x, groups)
    expected = torch.zeros_like(x)
    for token in range(TOKENS):
        for weight, expert in zip(weights[token], index[token].tolist(), strict=True):
            if expert < NOBODY:
                expected[token] += weight * expert_output(layer.experts, expert, x[token])
            elif expert > NOBODY:
                expected[token] += weight * expert_output(layer.shared_experts, expert - NOBODY - 1, x[token])
    got = layer(x[None], None if groups is None else groups[None])[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def output_and_gradients(layer: UniMoeSparseBlock, implementation: str, name: str) -> dict[str, torch.Tensor]:
    layer.experts.config._experts_implementation = implementation
    layer.zero_grad()
    x, groups = hidden().requires_grad_(), groups_of_tokens(name)
    output = layer(x[None], None if groups is None else groups[None])
    output.square().sum().backward()
    return {
        "output": output.detach(),
        "x": x.grad,
        **{n: parameter.grad.clone() for n, parameter in layer.named_parameters()},
    }


@any_router
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_backends_agree_on_numbers_and_gradients(name: str, implementation: str) -> None:
    layer = block(name)
    expected = output_and_gradients(layer, "eager", name)
    got = output_and_gradients(layer, implementation, name)
    assert got.keys() == expected.keys()
    for tensor, value in expected.items():
        torch.testing.assert_close(got[tensor], value, atol=1e-5, rtol=1e-4, msg=lambda m, t=tensor: f"{t}: {m}")


@any_router
def test_experts_that_are_split_over_ranks_are_sent_no_empty_slots(name: str) -> None:
    layer, x, groups = block(name), hidden(), groups_of_tokens(name)
    whole = layer(x[None], None if groups is None else groups[None])
    sent = []

    def on_one_rank(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Stands in for the exchange of tokens, which looks at the ids and runs every expert somewhere."""
        sent.append(index_TK)
        layer.experts.num_experts = 4
        return type(layer.experts).forward(layer.experts, x_TH, index_TK, weights_TK)

    layer.experts.forward = on_one_rank
    layer.experts.num_experts = 2
    split = layer(x[None], None if groups is None else groups[None])
    assert int(sent[0].max()) < 4
    assert int(sent[0].min()) >= 0
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-5)


@any_router
def test_every_weight_of_the_block_is_there_after_loading(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = UniMoeTextModel(tiny.text_config(num_hidden_layers=1, **ROUTERS[name], sparse_layers=[0])).eval()
    model.save_pretrained(tmp_path)
    loaded, report = UniMoeTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(5, 25)[None]
    types = torch.arange(20)[None] % 5
    expected = model(input_ids=ids, mm_token_type_ids=types).last_hidden_state
    got = loaded.eval()(input_ids=ids, mm_token_type_ids=types).last_hidden_state
    # Not bit-equal: where a file's tensors lie in memory decides which kernels multiply them.
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(loaded.layers[0].mlp.gate.row_expert_R, model.layers[0].mlp.gate.row_expert_R)


def test_a_block_without_extras_uses_no_switches() -> None:
    torch.manual_seed(0)
    layer = UniMoeTextModel(tiny.text_config()).layers[0].mlp
    assert not hasattr(layer, "shared_experts")
    assert not layer.experts._is_expert_parallel
