"""The dynamic router against token-by-token arithmetic, and what must hold whatever the weights are."""

import math
from typing import Any

import pytest
import tiny
import torch
from balance import load_balancing_loss

from unimoe import UniMoeTextConfig
from unimoe.modeling_unimoe.modeling_unimoe_text import UniMoeSparseBlock, UniMoeTextModel
from unimoe.modeling_unimoe.routing_dynamic_unimoe import UniMoeDynamicRouter, chosen_rows, pick_rows

TOKENS = 40
NOBODY = 4
BASE = {"num_null_experts": 1, "num_shared_experts": 2, "router_top_p": 0.7}


def dynamic_config(**text: Any) -> UniMoeTextConfig:
    return tiny.text_config(router_type="dynamic", num_hidden_layers=1, sparse_layers=[0], **{**BASE, **text})


def router(scale: float = 0.3, **text: Any) -> UniMoeDynamicRouter:
    gate = UniMoeDynamicRouter(dynamic_config(**text))
    gate.weight.data = scale * torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(0))
    return gate.eval()


def block(**text: Any) -> UniMoeSparseBlock:
    torch.manual_seed(0)
    return UniMoeTextModel(dynamic_config(**text)).layers[0].mlp.eval()


def hidden(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def naive_weights(logits: list[float], config: UniMoeTextConfig) -> list[float]:
    """Mixing weight of every gate row for one token without capacity; 0 for rows that are off."""
    choosable = config.num_experts + config.num_null_experts
    scores, shared = logits[:choosable], range(choosable, len(logits))
    best_first = sorted(range(choosable), key=lambda c: -scores[c])
    wanted = config.num_experts_per_tok
    if config.router_top_p:
        probabilities, wanted, reached = softmax(scores), 1, 0.0
        for row in best_first[:-1]:
            reached += probabilities[row]
            wanted += reached < config.router_top_p
    weights = [0.0] * len(logits)
    for position, row in enumerate(best_first[:wanted]):
        rivals = [
            other
            for other in best_first[position:]
            if scores[row] - scores[other] <= config.router_near_max_band * max(abs(scores[row]), abs(scores[other]))
        ]
        weights[row] = softmax([scores[r] for r in rivals])[rivals.index(row)]
    on = [*best_first[:wanted], *shared]
    everywhere = dict(zip(on, softmax([logits[row] for row in on]), strict=True))
    own, total = sum(everywhere[row] for row in best_first[:wanted]), sum(weights)
    for row in best_first[:wanted]:
        weights[row] *= own / total
    for row in shared:
        weights[row] = everywhere[row]
    return weights


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("band", [0.0, 0.02, 0.5])
@pytest.mark.parametrize(("null", "shared"), [(0, 0), (2, 0), (0, 1), (1, 2)])
def test_weights_match_plain_arithmetic(top_p: float, band: float, null: int, shared: int) -> None:
    gate = router(router_top_p=top_p, router_near_max_band=band, num_null_experts=null, num_shared_experts=shared)
    config = dynamic_config(
        router_top_p=top_p, router_near_max_band=band, num_null_experts=null, num_shared_experts=shared
    )
    x = hidden()
    logits, weights, index = gate(x)
    torch.testing.assert_close(logits, x @ gate.weight.T)
    assert weights.shape == index.shape == (TOKENS, config.max_choices_per_token + shared)
    for token in range(TOKENS):
        expected = naive_weights(logits[token].tolist(), config)
        got = [0.0] * (NOBODY + 1 + shared)
        for weight, expert in zip(weights[token].tolist(), index[token].tolist(), strict=True):
            assert weight == 0 or expert != NOBODY
            got[expert] += weight
        del got[NOBODY], expected[NOBODY : NOBODY + null]
        assert got == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("shared", [0, 2])
def test_weights_of_all_rows_that_are_on_sum_to_one(shared: int) -> None:
    routing = router(num_shared_experts=shared).route(hidden())
    on = torch.where(routing.chosen_TR, routing.weights_TR, 0)
    torch.testing.assert_close(on.sum(-1), torch.ones(TOKENS), atol=5e-6, rtol=0)
    assert torch.equal(routing.chosen_TR, routing.kept_TR)


def test_a_token_takes_no_more_than_it_needs_for_top_p() -> None:
    gate = router(num_shared_experts=0)
    routing = gate.route(hidden())
    probabilities = routing.logits_TR.softmax(-1)
    reached = torch.where(routing.chosen_TR, probabilities, 0).sum(-1)
    least = torch.where(routing.chosen_TR, probabilities, 2).amin(-1)
    assert (reached >= 0.7 - 1e-6).all()
    assert (reached - least < 0.7).all()
    assert len(routing.num_choices_T.unique()) > 1
    assert torch.equal(routing.chosen_TR.sum(-1), routing.num_choices_T)


@pytest.mark.parametrize("top_p", [0.1, 0.4, 0.5, 0.7, 0.95, 1.0])
def test_the_sureless_router_takes_as_many_as_there_are_columns(top_p: float) -> None:
    """Equal logits ask for the most choices; the static number of columns must hold them."""
    config = dynamic_config(router_top_p=top_p)
    gate = router(scale=0.0, router_top_p=top_p)
    routing = gate.route(hidden())
    assert config.max_choices_per_token - 1 <= int(routing.num_choices_T.max()) <= config.max_choices_per_token <= 5
    assert float(routing.num_choices_T.min()) >= 5 * top_p - 1e-6


def test_padding_chooses_nothing() -> None:
    mask = torch.arange(TOKENS) % 3 > 0
    for shared in (0, 2):
        layer = block(num_shared_experts=shared)
        x = hidden()
        _, weights, index = layer.gate(x, None, mask)
        expected = layer.gate(x)
        assert torch.equal(weights[mask], expected[1][mask])
        assert torch.equal(index[mask], expected[2][mask])
        choices = index.shape[1] - shared
        assert (index[~mask, :choices] == NOBODY).all()
        assert not weights[~mask, :choices].any()
        output = layer(x[None], None, mask[None])[0]
        torch.testing.assert_close(output[mask], layer(x[None])[0][mask])
        assert output[~mask].any() == bool(shared)
        if shared:
            torch.testing.assert_close(weights[~mask].sum(-1), torch.ones(int((~mask).sum())))


def test_jitter_moves_the_router_in_training_and_nothing_else() -> None:
    layer = block(router_jitter_noise=0.3)
    x = hidden()
    assert torch.equal(layer.gate(x)[0], layer.gate(x)[0])
    layer.train()
    assert not torch.allclose(layer.gate(x)[0], layer.gate(x)[0])
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x[None])
    assert torch.equal(seen[0], x)
    still = block().train()
    assert torch.equal(still.gate(x)[0], still.gate(x)[0])


def test_the_gate_computes_in_float32() -> None:
    gate, x = router().bfloat16(), hidden().bfloat16()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, weights, _ = gate(x)
        assert (logits.dtype, weights.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(logits, x.float() @ gate.weight.float().T)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_nothing_waits_for_the_device(policy: str) -> None:
    """Tensors without values: whatever reads one back to decide, or to size an output, fails."""
    text = {"expert_capacity_factor": 0.6, "capacity_policy": policy, "router_pick": "sample"}
    gate, config = router(**text).train().to("meta"), dynamic_config(**text)
    mask = torch.empty(TOKENS, dtype=torch.bool, device="meta")
    logits, weights, index = gate(hidden().to("meta"), None, mask)
    assert weights.shape == index.shape == (TOKENS, 6)
    load_balancing_loss((logits,), config, attention_mask_T=mask)


# --- capacity --------------------------------------------------------------------------------------------------------


def test_an_expert_keeps_its_highest_logits() -> None:
    gate = router(expert_capacity_factor=0.6, min_expert_capacity=1)
    capacity = math.ceil(TOKENS / 5 * 0.6)
    routing = gate.route(hidden())
    dropped = 0
    for row in range(5):
        chose = [t for t in range(TOKENS) if routing.chosen_TR[t, row]]
        best = sorted(chose, key=lambda t: -routing.logits_TR[t, row].item())[:capacity]
        assert [t for t in range(TOKENS) if routing.kept_TR[t, row]] == sorted(best)
        dropped += len(chose) - len(best)
    assert dropped
    assert routing.kept_TR[:, 5:].all()


def test_an_expert_keeps_its_first_tokens() -> None:
    layer = block(expert_capacity_factor=0.1, min_expert_capacity=3, capacity_policy="position")
    x = hidden()
    routing = layer.gate.route(x)
    for row in range(7):
        chose = [t for t in range(TOKENS) if routing.chosen_TR[t, row]]
        assert [t for t in range(TOKENS) if routing.kept_TR[t, row]] == chose[:3]
    _, weights, index = layer.gate(x)
    assert not weights[3:, -2:].any()
    assert (weights[:3, -2:] > 0).all()
    assert (index[:, -2:] == torch.tensor([5, 6])).all()
    nothing_left = ~routing.kept_TR.any(-1)
    assert nothing_left.any()
    assert not layer(x[None])[0][nothing_left].any()


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("shared", [0, 2])
def test_what_is_left_is_weighed_anew(policy: str, shared: int) -> None:
    gate = router(expert_capacity_factor=0.6, min_expert_capacity=1, capacity_policy=policy, num_shared_experts=shared)
    routing = gate.route(hidden())
    some = routing.kept_TR[:, :5].any(-1)
    assert (routing.kept_TR != routing.chosen_TR).any(-1)[some].any()
    on = torch.where(routing.kept_TR, routing.weights_TR, 0).sum(-1)
    torch.testing.assert_close(on[some], torch.ones(int(some.sum())), atol=5e-6, rtol=0)


def test_small_batches_are_not_cut_below_the_minimum() -> None:
    routing = router(expert_capacity_factor=0.01, min_expert_capacity=TOKENS + 5).route(hidden())
    assert torch.equal(routing.kept_TR, routing.chosen_TR)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pick", ["max", "sample"])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_gradients_reach_the_gate_the_experts_and_the_shared_experts(pick: str, factor: float | None) -> None:
    layer = block(router_pick=pick, expert_capacity_factor=factor, capacity_policy="position").train()
    mask = torch.arange(TOKENS) > 3
    layer(hidden()[None], None, mask[None]).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.flatten(1).any(dim=1).all(), name


def test_sampling_happens_in_training_only_and_within_the_band() -> None:
    gate = router(router_pick="sample", router_near_max_band=0.3)
    x = hidden()
    expected = router(router_near_max_band=0.3)(x)
    for got, want in zip(gate(x), expected, strict=True):
        assert torch.equal(got, want)
    gate.train()
    torch.manual_seed(0)
    assert any(not torch.equal(gate(x)[2], expected[2]) for _ in range(5))


def test_sampled_picks_follow_the_probabilities_of_the_band() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.5, 1.0, -3.0]]).expand(20_000, -1)
    rows, weights = pick_rows(logits, 1, near_max_band=0.5, sample=True)
    expected = torch.tensor([2.0, 1.5, 1.0]).softmax(-1)
    share = torch.bincount(rows[:, 0], minlength=4) / len(rows)
    torch.testing.assert_close(share[:3], expected, atol=0.02, rtol=0)
    assert share[3] == 0
    assert torch.allclose(weights[rows == 0], expected[0])
    whole = torch.isclose(weights[rows == 1], expected[1])
    assert torch.isclose(weights[rows == 1][~whole], expected[1] / 3).all()
    assert float(whole.float().mean()) == pytest.approx(0.25, abs=0.03)


def test_a_sampled_pick_learns_as_its_probability_does() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.5, 1.0, -3.0]] * 50, requires_grad=True)
    rows, weights = pick_rows(logits, 1, near_max_band=0.5, sample=True)
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    probability = logits[:, :3].softmax(-1).gather(1, rows)
    (expected,) = torch.autograd.grad(probability.sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert len(rows.unique()) == 3


def test_picks_are_recomputed_from_recorded_logits() -> None:
    config, mask = dynamic_config(), torch.arange(TOKENS) > 3
    routing = router().route(hidden(), mask)
    assert torch.equal(chosen_rows(routing.logits_TR, config, mask), routing.chosen_TR[:, :5])


# --- in the decoder --------------------------------------------------------------------------------------------------


def masks_seen(config: UniMoeTextConfig, **inputs: Any) -> torch.Tensor | None:
    model = UniMoeTextModel(config).eval()
    seen = []
    model.layers[0].mlp.gate.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    model(**inputs)
    return seen[0]


def test_the_decoder_tells_the_router_what_is_padding() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (ids > 0).long()
    assert torch.equal(masks_seen(dynamic_config(), input_ids=ids, attention_mask=mask), mask.bool().flatten())
    assert masks_seen(dynamic_config(), input_ids=ids) is None
    plain = tiny.text_config(num_hidden_layers=1, sparse_layers=[0])
    assert masks_seen(plain, input_ids=ids, attention_mask=mask) is None


def test_with_a_cache_the_mask_is_that_of_the_new_tokens() -> None:
    model = UniMoeTextModel(dynamic_config()).eval()
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (ids > 0).long()
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    seen = []
    model.layers[0].mlp.gate.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    new = torch.cat((mask, torch.tensor([[1, 0], [1, 1]])), dim=1)
    model(input_ids=ids[:, :2], attention_mask=new, past_key_values=cache)
    assert seen[0].tolist() == [True, False, True, True]


def test_masks_of_numbers_are_masks() -> None:
    gate = router(expert_capacity_factor=0.6, min_expert_capacity=1, capacity_policy="probs")
    mask = torch.arange(TOKENS) % 3 != 0
    assert torch.equal(gate.route(hidden(), mask.long()).kept_TR, gate.route(hidden(), mask).kept_TR)
