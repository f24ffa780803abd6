"""Losses beside what they would be with balanced experts."""

import math
from typing import Any

import pytest
import tiny
import torch

from unimoe.modeling_unimoe.losses_unimoe import balance_terms, step_totals
from unimoe.trainers.steps.loss_meter import LOGGED_LOSSES, LossMeter
from unimoe.trainers.steps.objective import LossParts

TOKENS = 60


def gates(config: Any, even: bool, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits of two layers; `even` ones let every expert be the first choice of as many tokens."""
    rows = config.num_gate_rows
    if not even:
        return tuple(torch.randn(TOKENS, rows, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))
    return tuple(torch.eye(rows).repeat(-(-TOKENS // rows), 1)[:TOKENS] * 0.5 for _ in range(2))


def ids(count: int = TOKENS) -> torch.Tensor:
    return torch.zeros(1, count, dtype=torch.long)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("layers", ["each", "joint"])
def test_even_use_costs_what_is_logged_as_balanced(top_k: int, layers: str) -> None:
    config = tiny.text_config(num_experts_per_tok=top_k, router_aux_loss_coef=0.3, router_aux_loss_layers=layers)
    terms = balance_terms(gates(config, even=top_k == 1), config, ids(), None, None)
    assert float(terms.even["aux_loss"]) == pytest.approx(1.0)
    assert float(terms.even["z_loss"]) == pytest.approx(math.log(config.num_experts) ** 2)
    assert float(terms.weighted_even) == pytest.approx(0.3)
    if top_k == 1:
        assert float(terms.losses["aux_loss"]) == pytest.approx(1.0)
    else:
        assert float(terms.losses["aux_loss"]) > 1.0


def test_every_group_with_tokens_adds_its_own() -> None:
    config = tiny.text_config(**tiny.MOIIE_GROUPS, router_group_aux_loss_coefs={}, router_aux_loss_coef=0.5)
    logits = gates(config, even=False)
    both = balance_terms(logits, config, ids(), torch.arange(TOKENS).view(1, -1) % 2, None)
    one = balance_terms(logits, config, ids(), ids(), None)
    assert float(both.even["aux_loss"]) == pytest.approx(2.0)
    assert float(one.even["aux_loss"]) == pytest.approx(1.0)
    assert float(both.weighted_even) == pytest.approx(1.0)


def test_with_dynamic_routing_it_is_the_number_of_choices() -> None:
    config = tiny.text_config(router_type="dynamic", router_top_p=0.6, router_aux_loss_coef=0.1)
    logits = gates(config, even=False)
    terms = balance_terms(logits, config, ids(), None, None)
    shares = [layer.softmax(-1).sort(-1, descending=True).values.cumsum(-1) for layer in logits]
    chosen = sum(((share < 0.6).sum(-1) + 1).float().mean() for share in shares) / 2
    assert float(terms.even["aux_loss"]) == pytest.approx(float(chosen), rel=1e-5)


def test_losses_about_modalities_have_theirs() -> None:
    modal = {"modality_experts": {"text": [0]}, "router_modality_loss_coef": 0.3, "router_divergence_loss_coef": 0.2}
    config = tiny.text_config(**modal)
    terms = balance_terms(gates(config, even=False), config, ids(), None, None)
    assert float(terms.even["modality_loss"]) == pytest.approx(1 - 1 / config.num_experts)
    mixed = (torch.arange(TOKENS) % 2).view(1, -1)
    terms = balance_terms(gates(config, even=False), config, mixed, None, None)
    assert float(terms.even["divergence_loss"]) == pytest.approx(1.0)


def test_parts_of_a_step_add_up_to_its_balanced_value() -> None:
    config = tiny.text_config(router_aux_loss_coef=0.3, router_z_loss_coef=0.1)
    logits = gates(config, even=False)
    whole = balance_terms(logits, config, ids(), None, None)
    step = step_totals(logits, config, ids(), None, None)
    parts = [
        balance_terms(tuple(layer[rows] for layer in logits), config, ids(len(logits[0][rows])), None, None, step)
        for rows in (slice(0, 7), slice(7, None))
    ]
    for name, value in whole.even.items():
        assert float(sum(part.even[name] for part in parts)) == pytest.approx(float(value), rel=1e-5)
    assert float(sum(part.weighted_even for part in parts)) == pytest.approx(float(whole.weighted_even), rel=1e-5)


# --- the meter ---------------------------------------------------------------------------------------------------------


def parts(loss: float) -> LossParts:
    routers = {"aux_loss": torch.tensor(loss / 10), "z_loss": torch.tensor(loss / 100)}
    balanced = {"aux_loss": torch.tensor(1.0), "z_loss": torch.tensor(2.0)}
    return LossParts(torch.tensor(loss), torch.tensor(loss), torch.tensor(loss - 1), routers, balanced)


def read(meter: LossMeter, batches: int = 1) -> dict[str, float]:
    return meter.read(tiny.text_config(), batches, lambda sums: sums)


def test_steps_that_were_left_out_do_not_count() -> None:
    meter = LossMeter()
    for loss, made in ((2.0, True), (float("nan"), False), (4.0, True)):
        meter.add(parts(loss), "text")
        meter.end_step(made)
    assert read(meter) == pytest.approx(
        {
            "loss": 3.0,
            "ce_loss": 3.0,
            "aux_loss": 0.3,
            "z_loss": 0.03,
            "loss_balanced": 2.0,
            "aux_loss_balanced": 1.0,
            "z_loss_balanced": 2.0,
        }
    )
    assert meter.groups == {"text": [2.0, 4.0]}
    assert read(meter) == {}


def test_a_step_of_two_batches_is_their_sum() -> None:
    meter = LossMeter()
    for loss in (1.0, 2.0):
        meter.add(parts(loss), "text")
    meter.end_step(made=True)
    assert read(meter, batches=2)["ce_loss"] == 3.0
    assert meter.groups == {"text": [2.0, 4.0]}  # of each batch by itself


def test_dense_models_have_nothing_to_balance() -> None:
    meter = LossMeter()
    meter.add(LossParts(torch.tensor(2.0), torch.tensor(2.0), torch.tensor(2.0)), "text")
    meter.end_step(made=True)
    dense = tiny.text_config(num_experts=0, sparse_layers=[])
    logged = meter.read(dense, 1, lambda sums: sums)
    assert logged == {"loss": 2.0, "ce_loss": 2.0, "aux_loss": 0.0, "z_loss": 0.0}
    assert set(logged) <= set(LOGGED_LOSSES)
