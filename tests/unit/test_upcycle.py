"""Upcycling in memory: the sparse model equals the dense one, owns its weights, and refuses what cannot work."""

from typing import Any

import pytest
import tiny
import torch

from unimoe import UniMoeForCausalLM
from unimoe.conversion.upcycling.sparsity import Sparsity
from unimoe.conversion.upcycling.upcycle import upcycle_model
from unimoe.errors import ConfigurationError, ConversionError

DENSE = {"num_experts": 0, "sparse_layers": None}
CHOICE = {"num_experts": 4, "num_experts_per_tok": 2, "sparse_layers": [0, 2]}


def dense_model(**text: Any) -> UniMoeForCausalLM:
    return tiny.model({**DENSE, **text})


def everything() -> dict[str, torch.Tensor]:
    ids = torch.tensor([tiny.prompt(1, 5, "image", 7, "audio", "video", 9, 11)])
    return {"input_ids": ids, **tiny.media(images=1, videos=1, windows=1)}


@torch.no_grad()
def gap(one: UniMoeForCausalLM, other: UniMoeForCausalLM, **inputs: torch.Tensor) -> float:
    return float((one(**inputs).logits - other(**inputs).logits).abs().max())


def some_ffns(dense: UniMoeForCausalLM, layers: list[int], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.2
        for name, tensor in dense.model.language_model.state_dict().items()
        if ".mlp." in name and int(name.split(".")[1]) in layers
    }


@pytest.mark.parametrize("router_init", ["normal", "zeros"])
@pytest.mark.parametrize(
    "groups", [{}, tiny.MOIIE_GROUPS, {"routing": {"router_type": "dynamic", "router_top_p": 0.7}}]
)
def test_copies_leave_the_function_as_it_was(router_init: str, groups: dict[str, Any]) -> None:
    dense = dense_model()
    sparse = upcycle_model(dense, Sparsity(**CHOICE, **groups, router_init=router_init))
    assert gap(dense, sparse, **everything()) <= 1e-5
    assert sparse.config.text_config.sparse_layers == [0, 2]
    assert sparse.model.language_model.layers[0].mlp.experts.gate_up_proj.shape == (4, 96, tiny.HIDDEN)


def test_text_only_model_with_a_tied_head_in_bfloat16() -> None:
    dense = UniMoeForCausalLM(
        type(tiny.config())(text_config=tiny.text_config(**DENSE, tie_word_embeddings=True))
    ).bfloat16()
    sparse = upcycle_model(dense.train(), Sparsity(**CHOICE))
    assert sparse.lm_head.weight is sparse.get_input_embeddings().weight
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.bfloat16}
    assert sparse.training


def test_given_experts_and_router_rows_land_where_they_belong() -> None:
    dense = dense_model()
    experts = [some_ffns(dense, [0, 2], seed) for seed in range(4)]
    # A router that sends every token to expert 3 alone makes the sparse model that expert's dense model.
    rows = torch.zeros(4, tiny.HIDDEN)
    sparse = upcycle_model(
        dense,
        Sparsity(num_experts=4, num_experts_per_tok=1, sparse_layers=[0, 2]),
        expert_ffns=experts,
        router_rows={0: rows, 2: rows},
    )
    for layer in (0, 2):
        sparse.model.language_model.layers[layer].mlp.gate.row_expert_R.fill_(3)
    only_third = dense_model()
    only_third.load_state_dict(dense.state_dict())
    only_third.model.language_model.load_state_dict(experts[3], strict=False)
    assert gap(only_third, sparse, **everything()) <= 1e-5
    assert gap(dense, sparse, **everything()) > 1e-2
    assert torch.equal(sparse.model.language_model.layers[2].mlp.gate.weight, rows)


def test_nothing_is_shared_and_generation_settings_are_kept() -> None:
    dense = dense_model()
    dense.generation_config.suppress_tokens = [92, 93]
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = upcycle_model(dense, Sparsity(**CHOICE))
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert sparse.generation_config.suppress_tokens == [92, 93]
    frozen = {name for name, parameter in sparse.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all("_tower." in name for name in frozen)


def test_router_rows_depend_on_seed_and_layer_only() -> None:
    dense = dense_model()
    one = upcycle_model(dense, Sparsity(**CHOICE, seed=1)).model.language_model.layers
    same = upcycle_model(dense, Sparsity(**{**CHOICE, "sparse_layers": [2]}, seed=1)).model.language_model.layers
    other = upcycle_model(dense, Sparsity(**CHOICE, seed=2)).model.language_model.layers
    assert torch.equal(one[2].mlp.gate.weight, same[2].mlp.gate.weight)
    assert not torch.equal(one[2].mlp.gate.weight, other[2].mlp.gate.weight)
    assert not torch.equal(one[2].mlp.gate.weight, one[0].mlp.gate.weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sparse_layers": [3]}, ConfigurationError, "sparse_layers"),
        ({"sparse_layers": []}, ConversionError, "empty"),
        ({"num_experts_per_tok": 5}, ConfigurationError, "num_experts_per_tok"),
        ({"router_init": "ones"}, ConversionError, "'ones'"),
        ({"router_rows": {0: torch.zeros(3, 8)}}, ConversionError, r"layer 0 have shape \(3, 8\)"),
        ({"granularity": 5}, ConversionError, "granularity is 5; it must divide"),
        ({"granularity": 12}, ConversionError, "width 4, which must be a multiple of 8"),
        ({"granularity": 3}, ConversionError, "num_experts is 4, but a granularity of 3"),
        ({"granularity": 2, "num_experts_per_tok": 1}, ConversionError, "num_experts_per_tok is 1, but"),
        ({"granularity": 2, "router_init": "zeros"}, ConversionError, "does not go with router_init 'zeros'"),
        ({"granularity": 2, **tiny.MOIIE_GROUPS}, ConversionError, "it needs whole copies"),
        ({"noise": -1.0}, ConversionError, "noise is -1.0"),
        ({"drop_ratio": 1.5}, ConversionError, "drop_ratio is 1.5"),
        ({"expert_ffns": [{}] * 4, "noise": 0.1}, ConversionError, "taken as they are"),
        ({"expert_ffns": [{}] * 3}, ConversionError, "holds 3 experts"),
        ({"expert_ffns": [{}] * 4}, ConversionError, "lacks layers.0.mlp.gate_proj.weight"),
    ],
)
def test_impossible_requests_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {name: value for name, value in change.items() if name in ("expert_ffns", "router_rows")}
    fields = {name: value for name, value in change.items() if name not in given}
    with pytest.raises(error, match=message):
        upcycle_model(dense_model(), Sparsity(**{**CHOICE, **fields}), **given)


def test_a_sparse_model_is_refused() -> None:
    with pytest.raises(ConversionError, match="already has 4 experts"):
        upcycle_model(tiny.model(), Sparsity(**CHOICE))
