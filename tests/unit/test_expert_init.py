"""Experts start as the published ways say: whole or in parts, with noise, or with a share of new dimensions."""

from typing import Any

import pytest
import tiny
import torch

from unimoe import UniMoeForCausalLM
from unimoe.conversion.upcycling.exactness import certain_changes, is_exact
from unimoe.conversion.upcycling.expert_init import expected_deviation, routed_projection
from unimoe.conversion.upcycling.sparsity import Sparsity, sparse_text_config
from unimoe.conversion.upcycling.upcycle import upcycle_model

DENSE = tiny.text_config(num_experts=0, sparse_layers=None)
WIDTH, HIDDEN = DENSE.intermediate_size, DENSE.hidden_size
NAMES = ("gate_proj", "up_proj", "down_proj")


def sparsity(**fields: Any) -> Sparsity:
    return Sparsity(**{"num_experts": 4, "num_experts_per_tok": 2, "sparse_layers": (0, 2), **fields})


def dense_ffn(width: int = WIDTH, hidden: int = HIDDEN) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {name: torch.randn(shape, generator=generator) + 0.3 for name, shape in shapes.items()}


def expert(index: int, ffn: dict[str, torch.Tensor], layer: int = 0, **fields: Any) -> dict[str, torch.Tensor]:
    return {name: routed_projection(ffn[name], name, sparsity(**fields), layer, index) for name in NAMES}


def run(ffn: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ ffn["gate_proj"].T) * (x @ ffn["up_proj"].T)) @ ffn["down_proj"].T


def everything() -> dict[str, torch.Tensor]:
    ids = torch.tensor([tiny.prompt(1, 5, "image", 7, "audio", "video", 9, 11)])
    return {"input_ids": ids, **tiny.media(images=1, videos=1, windows=1)}


def gap(one: UniMoeForCausalLM, other: UniMoeForCausalLM) -> float:
    with torch.no_grad():
        return float((one(**everything()).logits - other(**everything()).logits).abs().max())


@pytest.mark.parametrize(
    "fields",
    [
        {"routing": {"num_shared_experts": 2}},
        {"num_experts": 6, "num_experts_per_tok": 3, "granularity": 3},
        {"num_experts": 8, "num_experts_per_tok": 4, "granularity": 2},
        {"num_experts": 8, "num_experts_per_tok": 4, "granularity": 2, "routing": {"num_shared_experts": 1}},
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "granularity": 2,
            "expert_groups": {"vision": [0, 1, 2, 3, 4, 5], "language": [2, 3, 4, 5, 6, 7]},
            "modality_groups": tiny.MOIIE_GROUPS["modality_groups"],
        },
    ],
)
def test_shared_experts_and_virtual_groups_leave_the_function_as_it_was(fields: dict[str, Any]) -> None:
    dense = tiny.model({"num_experts": 0, "sparse_layers": None})
    choice = sparsity(**fields)
    assert is_exact(sparse_text_config(DENSE, choice), choice)
    assert expected_deviation(sparse_text_config(DENSE, choice), choice) == 0
    assert gap(dense, upcycle_model(dense, choice)) <= 1e-5


def test_parts_of_a_copy_sum_up_to_it_and_are_scaled_by_their_number() -> None:
    ffn, x = dense_ffn(), torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    parts = [expert(i, ffn, granularity=2) for i in range(4)]
    assert parts[0]["gate_proj"].shape == (WIDTH // 2, HIDDEN)
    assert parts[0]["down_proj"].shape == (HIDDEN, WIDTH // 2)
    torch.testing.assert_close(run(parts[0], x) + run(parts[1], x), 2 * run(ffn, x), atol=1e-3, rtol=1e-5)
    assert all(torch.equal(parts[0][name], parts[2][name]) for name in NAMES)


def test_virtual_groups_share_their_gate_rows() -> None:
    dense = tiny.model({"num_experts": 0, "sparse_layers": None})
    choice = sparsity(num_experts=8, num_experts_per_tok=4, granularity=2)
    rows = upcycle_model(dense, choice).model.language_model.layers[0].mlp.gate.weight
    assert torch.equal(rows[::2], rows[1::2])
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_virtual_groups_choose_whole_copies_in_bfloat16() -> None:
    dense = tiny.model({"num_experts": 0, "sparse_layers": None})
    choice = sparsity(num_experts=8, num_experts_per_tok=2, granularity=2)
    gate = upcycle_model(dense, choice).to(torch.bfloat16).model.language_model.layers[0].mlp.gate
    x_TH = torch.randn(4000, gate.weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        _, _, index_TK = gate(x_TH)
    parts_TK = index_TK.sort(dim=-1).values
    assert torch.equal(parts_TK[:, 0] + 1, parts_TK[:, 1])
    assert not (parts_TK[:, 0] % 2).any()


def test_slices_are_consecutive_unscaled_and_wrap_around() -> None:
    ffn = dense_ffn()
    slices = [expert(i, ffn, num_experts=4, granularity=3, split="slices") for i in range(4)]
    for name in NAMES:
        whole = torch.cat([part[name] for part in slices[:3]], dim=int(name == "down_proj"))
        assert torch.equal(whole, ffn[name])
        assert torch.equal(slices[3][name], slices[0][name])
    dense = tiny.model({"num_experts": 0, "sparse_layers": None})
    choice = sparsity(granularity=3, split="slices", routing={"num_shared_experts": 1})
    layer = upcycle_model(dense, choice).model.language_model.layers[0].mlp
    first = dense.model.language_model.layers[0].mlp.gate_proj.weight[: WIDTH // 3]
    assert torch.equal(layer.shared_experts.gate_up_proj[0, : WIDTH // 3], first)


def test_dropped_dimensions_are_the_same_in_all_projections_and_differ_between_experts() -> None:
    ffn = dense_ffn(width=400, hidden=64)
    changed = []
    for index in range(3):
        new = expert(index, ffn, drop_ratio=0.25)
        rows = [(new[name] != ffn[name]).any(1) for name in ("gate_proj", "up_proj")]
        columns = (new["down_proj"] != ffn["down_proj"]).any(0)
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], columns)
        assert int(columns.sum()) == 100
        changed.append(columns)
        # What comes in their place is as large as what was there: mean 0.3, deviation 1, of 6400 values.
        assert abs(float(new["up_proj"][columns].mean()) - 0.3) < 0.05
        assert abs(float(new["up_proj"][columns].std()) - 1) < 0.05
    assert not torch.equal(changed[0], changed[1])
    again = expert(0, ffn, drop_ratio=0.25)
    assert torch.equal(again["gate_proj"], expert(0, ffn, drop_ratio=0.25)["gate_proj"])
    assert not torch.equal(again["gate_proj"], expert(0, ffn, drop_ratio=0.25, seed=1)["gate_proj"])
    assert not torch.equal(again["gate_proj"], expert(0, ffn, layer=2, drop_ratio=0.25)["gate_proj"])
    assert torch.equal(expert(0, ffn, drop_ratio=0.0)["gate_proj"], ffn["gate_proj"])


def test_noise_is_relative_to_each_matrix() -> None:
    ffn = dense_ffn(width=400, hidden=64)
    ffn["up_proj"] *= 10
    for name in NAMES:
        change = expert(1, ffn, noise=0.1)[name] - ffn[name]
        assert abs(float(change.std() / ffn[name].std()) - 0.1) < 0.005
        assert abs(float(change.mean() / ffn[name].std())) < 0.005


def test_shared_experts_stay_copies() -> None:
    dense = tiny.model({"num_experts": 0, "sparse_layers": None})
    choice = sparsity(noise=0.5, drop_ratio=0.5, routing={"num_shared_experts": 1})
    layer = upcycle_model(dense, choice).model.language_model.layers[2].mlp
    assert torch.equal(layer.shared_experts.down_proj[0], dense.model.language_model.layers[2].mlp.down_proj.weight)
    assert not torch.equal(layer.experts.down_proj[0], layer.experts.down_proj[1])


@pytest.mark.parametrize(
    "fields",
    [
        {"noise": 0.05},
        {"drop_ratio": 0.2},
        {"drop_ratio": 0.5},
        {"granularity": 3, "split": "slices"},
        {"granularity": 2, "split": "slices"},
    ],
)
def test_the_expected_deviation_is_about_what_comes(fields: dict[str, Any]) -> None:
    ffn = {name: tensor - 0.3 for name, tensor in dense_ffn(width=600, hidden=128).items()}
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(1)) / 128**0.5
    choice = sparsity(**fields)
    expected = run(ffn, x)
    mixed = sum(run(expert(index, ffn, **fields), x) for index in (0, 1)) / 2
    measured = float((mixed - expected).norm() / expected.norm())
    assert not is_exact(sparse_text_config(DENSE, choice), choice)
    assert measured / 1.4 < expected_deviation(sparse_text_config(DENSE, choice), choice) < measured * 1.4


def test_null_experts_lose_the_expected_share() -> None:
    choice = sparsity(routing={"num_null_experts": 2})
    lost = torch.tensor([0, 1, 2, 3, 4, 5]).float()
    pairs = torch.combinations(lost, 2)
    rms = float(((pairs >= 4).float().mean(1) ** 2).mean().sqrt())
    assert abs(expected_deviation(sparse_text_config(DENSE, choice), choice) - rms) < 1e-6


@pytest.mark.parametrize(
    ("fields", "dtype", "said"),
    [
        *(({"granularity": g}, torch.bfloat16, f"a granularity of {g} in bfloat16") for g in (3, 5, 6, 7)),
        *(({"granularity": g}, torch.float16, None) for g in (2, 4, 8)),
        ({"granularity": 3}, torch.float32, None),
        ({"granularity": 3, "split": "slices"}, torch.bfloat16, "slices"),
        ({"drop_ratio": 0.001}, torch.float32, None),  # of 48 dimensions, none
        ({"routing": {"num_null_experts": 1}}, torch.float32, "null experts"),
        ({"routing": {"norm_topk_prob": False}}, torch.float32, "norm_topk_prob"),
        ({"routing": {"norm_topk_prob": False}, "num_experts_per_tok": 4}, torch.float32, None),
        (
            {"routing": {"norm_topk_prob": False, "router_scoring": "sigmoid"}, "num_experts_per_tok": 4},
            torch.float32,
            "norm_topk_prob",
        ),
    ],
)
def test_what_changes_the_function_is_known_beforehand(
    fields: dict[str, Any], dtype: torch.dtype, said: str | None
) -> None:
    parts = fields.get("granularity", 1)
    counts = {"num_experts": 4 * parts, "num_experts_per_tok": 2 * parts} if parts > 1 else {}
    choice = sparsity(**counts, **fields)
    dense = tiny.text_config(num_experts=0, sparse_layers=None, intermediate_size=6720 if parts > 1 else WIDTH)
    config = sparse_text_config(dense, choice)
    changes = certain_changes(config, choice, dtype)
    assert is_exact(config, choice, dtype) == (said is None)
    assert [said in change for change in changes] == ([] if said is None else [True])
    assert (expected_deviation(config, choice, dtype) > 0) == (said is not None) or "drop_ratio" in fields


@pytest.mark.parametrize(
    ("routing", "router"),
    [
        ({"router_type": "dynamic", "router_top_p": 0.7, "expert_capacity_factor": 1.0}, "normal"),
        ({"num_null_experts": 1}, "zeros"),
    ],
)
def test_what_only_running_the_model_tells_is_neither_exact_nor_refused(routing: dict[str, Any], router: str) -> None:
    choice = sparsity(routing=routing, router_init=router)
    config = sparse_text_config(DENSE, choice)
    assert not is_exact(config, choice)
    assert not certain_changes(config, choice)
