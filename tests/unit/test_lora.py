"""Adapters: on everything that was asked for or an error; saved, loaded, merged and loaded again without loss."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from peft import PeftModel

from unimoe import UniMoeForCausalLM
from unimoe.errors import RecipeError
from unimoe.roles import role_of
from unimoe.trainers.parallel.spread_lora import _adapted_modules, _experts_forward
from unimoe.trainers.recipe.recipe_parts import LoraSettings
from unimoe.trainers.steps import lora
from unimoe.trainers.steps.lora import add_lora, merge_lora
from unimoe.trainers.steps.trainable import set_trainable

IDS = torch.arange(5, 25).view(2, 10)


def model(**text: Any) -> UniMoeForCausalLM:
    made = tiny_training.model(tiny_training.processor(), sparse=True, **text)
    set_trainable(made, ["router"])
    return made


@torch.no_grad()
def logits(made: Any) -> torch.Tensor:
    return made.eval()(input_ids=IDS).logits


@torch.no_grad()
def trained(made: UniMoeForCausalLM) -> Any:
    """With adapters that are not zero any more, and a router that has moved."""
    torch.manual_seed(0)
    adapted = add_lora(made, LoraSettings(rank=4, targets=["experts", "attention", "ffn"]))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted


def test_every_layer_of_every_target_gets_adapters() -> None:
    adapted = trained(model())
    roles = [role_of(name) for name, _ in adapted.named_parameters() if ".lora_A." in name]
    assert {role: roles.count(role) for role in set(roles)} == {"attention": 12, "experts": 4, "ffn": 3}


@pytest.mark.parametrize("targets", [["ffn"], ["attention", "ffn"]])
def test_a_target_that_the_model_lacks_is_an_error(targets: list[str]) -> None:
    """PEFT leaves it out in silence where another target matches."""
    with pytest.raises(
        RecipeError, match=r"lora\.targets holds 'ffn' but the model has none: all of its layers are sparse"
    ):
        add_lora(model(sparse_layers=[0, 1, 2]), LoraSettings(targets=targets))
    dense = tiny_training.model(tiny_training.processor())
    with pytest.raises(RecipeError, match=r"holds 'experts' but the model has none: take 'ffn'"):
        add_lora(dense, LoraSettings(targets=["experts", "attention"]))


def test_an_attach_that_matches_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_EXPERT_PARAMETERS", ["mlp.experts.gate_up_proj", "mlp.experts.renamed"])
    with pytest.raises(RecipeError, match=r"'experts': 4 weights should have got adapters, 2 did"):
        add_lora(model(), LoraSettings(targets=["experts", "attention"]))


def test_saved_adapters_come_back_to_the_last_bit(tmp_path: Path) -> None:
    adapted = trained(model())
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    # Adapters only: the router that trained beside them is in a checkpoint's own file.
    base = model()
    base.load_state_dict(
        {n: p for n, p in adapted.get_base_model().state_dict().items() if n in base.state_dict()}, strict=False
    )
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(logits(loaded), expected)


def test_merging_costs_a_rounding_and_reloading_nothing(tmp_path: Path) -> None:
    adapted = trained(model())
    expected = logits(adapted)
    merged = merge_lora(adapted)
    gap = float((logits(merged) - expected).norm() / expected.norm())
    assert 0 < gap < 2e-6  # measured: 4e-7; W x + B A x is not (W + B A) x in float32
    merged.save_pretrained(tmp_path)
    loaded = UniMoeForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model().state_dict().keys()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    again = merge_lora(trained(model())).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.state_dict().items())


@torch.no_grad()
def test_autocast_does_not_round_weights_before_adapters_are_added() -> None:
    """In bfloat16 a weight has 8 bits, below which most of what a young adapter adds would vanish."""
    adapted = trained(model())
    name, adapters = next(pair for pair in _adapted_modules(adapted.get_base_model()) if "experts" in pair[0])
    experts = adapters[0].get_base_layer()
    computed_with = _experts_forward(
        lambda: torch.stack([experts._parameters["gate_up_proj"].sum(), experts._parameters["down_proj"].sum()]),
        experts,
        adapters,
        lambda adapter, b_EOR, a_ERI: (b_EOR, a_ERI),
    )
    without = computed_with()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(computed_with(), without), name


def test_settings_are_checked() -> None:
    with pytest.raises(RecipeError, match="dropout"):
        add_lora(model(), dataclasses.replace(LoraSettings(), dropout=0.1))
