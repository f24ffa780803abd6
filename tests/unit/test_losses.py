"""Balance terms against plain loops, and how they enter the model's loss."""

import math
from typing import Any

import pytest
import tiny
import torch
import twins
from balance import load_balancing_loss

from unimoe import UniMoeTextConfig
from unimoe.modeling_unimoe.losses_unimoe import router_z_loss

TOKENS = 30


def text_config(num_experts: int = 4, top_k: int = 2, **text: Any) -> UniMoeTextConfig:
    return tiny.text_config(num_experts=num_experts, num_experts_per_tok=top_k, **text)


def random_logits(rows: int, layers: int = 2, tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tokens, rows, generator=generator) for _ in range(layers))


def naive_balance(
    logits: torch.Tensor, config: UniMoeTextConfig, groups: list[int], mask: list[int], scoring: str = "softmax"
) -> float:
    """The documented formula, one token at a time."""
    total, first_row = 0.0, 0
    for index, group in enumerate(config.router_groups):
        size, k = len(group.experts), config.num_experts_per_tok
        tokens = [t for t in range(len(logits)) if mask[t] and groups[t] == index]
        assigned, probability = [0.0] * size, [0.0] * size
        for token in tokens:
            row = [float(v) for v in logits[token, first_row : first_row + size]]
            scores = [math.exp(v) if scoring == "softmax" else 1 / (1 + math.exp(-v)) for v in row]
            for expert in sorted(range(size), key=lambda e: -row[e])[:k]:
                assigned[expert] += 1 / (k * len(tokens))
            for expert in range(size):
                probability[expert] += scores[expert] / sum(scores) / len(tokens)
        total += size * sum(f * p for f, p in zip(assigned, probability, strict=True))
        first_row += size
    return total


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (4, 1), (4, 2), (8, 3)])
def test_even_load_costs_one(num_experts: int, top_k: int) -> None:
    """Tokens that prefer each expert in turn, all equally much."""
    config = text_config(num_experts, top_k)
    turns = torch.arange(num_experts)
    logits = torch.stack([(turns.roll(int(t)) < top_k).float() * 5 for t in turns])
    torch.testing.assert_close(load_balancing_loss((logits,), config), torch.tensor(1.0))


def test_one_favourite_costs_as_much_as_there_are_experts() -> None:
    logits = torch.tensor([[50.0, 0, 0, 0]] * TOKENS)
    torch.testing.assert_close(load_balancing_loss((logits,), text_config(top_k=1)), torch.tensor(4.0))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("grouped", [False, True])
def test_balance_matches_a_plain_loop(scoring: str, grouped: bool) -> None:
    config = text_config(router_scoring=scoring, **(tiny.MOIIE_GROUPS if grouped else {}))
    logits = random_logits(rows=6 if grouped else 4)
    groups = [t % 2 if grouped else 0 for t in range(TOKENS)]
    mask = [int(t % 5 > 0) for t in range(TOKENS)]
    got = load_balancing_loss(logits, config, torch.tensor(groups) if grouped else None, torch.tensor(mask))
    expected = sum(naive_balance(layer, config, groups, mask, scoring) for layer in logits) / len(logits)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_z_loss_matches_a_plain_loop() -> None:
    logits = random_logits(rows=4)
    mask = [int(t % 5 > 0) for t in range(TOKENS)]
    per_layer = [
        sum(m * math.log(sum(math.exp(float(v)) for v in row)) ** 2 for m, row in zip(mask, layer, strict=True))
        for layer in logits
    ]
    expected = sum(per_layer) / len(logits) / sum(mask)
    assert float(router_z_loss(logits, torch.tensor(mask))) == pytest.approx(expected, rel=1e-5)


def test_nothing_but_padding_costs_nothing() -> None:
    logits, nobody = random_logits(rows=4), torch.zeros(TOKENS)
    assert float(load_balancing_loss(logits, text_config(), attention_mask_T=nobody)) == 0
    assert float(router_z_loss(logits, nobody)) == 0


def test_a_group_without_tokens_is_harmless() -> None:
    config = text_config(**tiny.MOIIE_GROUPS)
    logits = tuple(layer.requires_grad_() for layer in random_logits(rows=6))
    loss = load_balancing_loss(logits, config, torch.zeros(TOKENS, dtype=torch.long))
    loss.backward()
    for layer in logits:
        assert layer.grad[:, :3].any()
        assert not layer.grad[:, 3:].any()
        assert torch.isfinite(layer.grad).all()


def test_gradients_push_towards_balance() -> None:
    """A step against the gradient lowers the logit of the expert that everybody prefers."""
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * TOKENS).requires_grad_()
    load_balancing_loss((logits,), text_config(top_k=1)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def naive_dynamic_balance(
    logits: torch.Tensor, config: UniMoeTextConfig, mask: list[int], weights: list[float]
) -> float:
    """The documented formula, one token at a time."""
    choosable = config.num_experts + config.num_null_experts
    chosen_share, probability = [0.0] * choosable, [0.0] * choosable
    for token, weight in enumerate(weights):
        row = [math.exp(float(v)) for v in logits[token, :choosable]]
        taken: list[int] = []
        while mask[token] and sum(row[c] for c in taken) / sum(row) < config.router_top_p:
            taken.append(max(set(range(choosable)) - set(taken), key=lambda c: row[c]))
        for c in range(choosable):
            chosen_share[c] += weight * (c in taken)
            among = row[c] / sum(row[t] for t in taken) * (c in taken) if taken else 1 / choosable
            probability[c] += weight * among
    return choosable * sum(f * p for f, p in zip(chosen_share, probability, strict=True)) / sum(weights) ** 2


@pytest.mark.parametrize("weighted", [False, True])
def test_dynamic_balance_matches_a_plain_loop(weighted: bool) -> None:
    config = text_config(router_type="dynamic", router_top_p=0.7, num_null_experts=1, num_shared_experts=2)
    logits = random_logits(rows=7)
    mask = [int(t % 5 > 0) for t in range(TOKENS)]
    weights = [0.01 * (t % 4) + 0.01 for t in range(TOKENS)] if weighted else [float(m) for m in mask]
    got = load_balancing_loss(
        logits,
        config,
        attention_mask_T=torch.tensor(mask),
        token_weight_T=torch.tensor(weights) if weighted else None,
    )
    expected = sum(naive_dynamic_balance(layer, config, mask, weights) for layer in logits) / len(logits)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_dynamic_balance_of_nothing_but_padding_costs_nothing() -> None:
    config = text_config(router_type="dynamic", router_top_p=0.7)
    logits = random_logits(rows=4)[0].requires_grad_()
    loss = load_balancing_loss((logits,), config, attention_mask_T=torch.zeros(TOKENS))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_token_weights_count_tokens_in_the_means() -> None:
    """A token of weight 2 counts as two tokens."""
    logits, weight = random_logits(rows=4, layers=1)[0], torch.arange(TOKENS) % 3
    repeated = logits.repeat_interleave(weight, dim=0)
    for kind in ({}, {"router_type": "dynamic", "router_top_p": 0.6}):
        config = text_config(**kind)
        got = load_balancing_loss((logits,), config, token_weight_T=0.01 * weight)
        torch.testing.assert_close(got, load_balancing_loss((repeated,), config))


@pytest.mark.parametrize("grouped", [False, True])
def test_null_experts_take_part_in_the_balance(grouped: bool) -> None:
    """They are rows like any other: the loss is that of a model in which they were experts."""
    groups = tiny.MOIIE_GROUPS if grouped else {}
    config = text_config(num_null_experts=1, num_shared_experts=2, **groups)
    if grouped:
        as_experts = {"vision": [0, 1, 2, 4], "language": [1, 2, 3, 5]}
        groups = {**groups, "expert_groups": as_experts}
    counted = text_config(num_experts=6 if grouped else 5, **groups)
    logits = random_logits(rows=10 if grouped else 7)
    token_group = torch.arange(TOKENS) % 2 if grouped else None
    got = load_balancing_loss(logits, config, token_group)
    # Groups come in the order of their names: language first.
    expected = load_balancing_loss(tuple(layer[:, :-2] for layer in logits), counted, token_group)
    torch.testing.assert_close(got, expected)


# --- in the model ----------------------------------------------------------------------------------------------------


def test_loss_is_the_sum_of_its_parts() -> None:
    model = tiny.model(text={"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05})
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    expected_ce = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(output.ce_loss, expected_ce)
    config = model.config.text_config
    torch.testing.assert_close(output.aux_loss, load_balancing_loss(output.router_logits, config))
    torch.testing.assert_close(output.z_loss, router_z_loss(output.router_logits))
    torch.testing.assert_close(output.loss, output.ce_loss + 0.3 * output.aux_loss + 0.05 * output.z_loss)


@pytest.mark.parametrize("name", twins.TWINS)
def test_padding_changes_no_part_of_the_loss(name: str) -> None:
    model = twins.build(name)
    sample = twins.samples(name)[0]
    inputs = sample.inputs()
    labels = inputs["input_ids"].clone()
    labels[:, 0] = -100  # padded, it could be predicted: from the last padding
    pad = torch.zeros(1, 7, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([pad, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([pad, inputs["attention_mask"]], dim=1),
    }
    plain = model(**inputs, labels=labels)
    with_padding = model(**padded, labels=torch.cat([pad - 100, labels], dim=1))
    for part in ("loss", "ce_loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(with_padding[part], plain[part], atol=1e-5, rtol=1e-5, msg=part)


def test_router_terms_of_micro_batches_are_averaged_not_summed() -> None:
    """Four equal micro-batches of an accumulated batch together cost what one of them costs alone."""
    model = tiny.model(text={"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05})
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    alone = model(input_ids=ids, labels=ids)
    items = 4 * ids[:, 1:].numel()
    parts = [model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(items)) for _ in range(4)]
    torch.testing.assert_close(sum(part.loss for part in parts), alone.loss)
    for part in parts:
        assert float(part.aux_loss) == pytest.approx(float(alone.aux_loss))


def test_router_gradients_do_not_grow_with_accumulation() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])

    def router_gradient(steps: int) -> torch.Tensor:
        model = tiny.model(text={"router_aux_loss_coef": 10.0})
        for _ in range(steps):
            model(input_ids=ids, labels=ids, num_items_in_batch=steps * ids[:, 1:].numel()).loss.backward()
        return model.model.language_model.layers[0].mlp.gate.weight.grad

    torch.testing.assert_close(router_gradient(4), router_gradient(1))


def test_dense_models_have_no_balance_terms() -> None:
    model = tiny.model(text={"num_experts": 0, "sparse_layers": []})
    ids = torch.tensor([[5, 6, 7]])
    output = model(input_ids=ids, labels=ids)
    assert output.aux_loss is None
    assert torch.equal(output.loss, output.ce_loss)
