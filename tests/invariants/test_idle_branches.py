"""What a training batch lacks is still part of the graph: gradients of 0 where nothing was learned, none missing."""

from typing import Any

import pytest
import tiny
import torch
import twins

from unimoe import UniMoeForCausalLM


def prompts(modality: str | None) -> dict[str, Any]:
    samples = {None: ([1, 5, 6, 7, 8], {}), "image": ([1, *[tiny.IMAGE] * 4, 5, 6], {"images": 1})}
    ids, media = samples[modality]
    given = {k: v for k, v in tiny.media(**media).items() if media} if media else {}
    return {"input_ids": torch.tensor([ids]), **given}


def gradients(model: UniMoeForCausalLM, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    model.train()
    model(**inputs, labels=inputs["input_ids"].clamp(max=90)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("freeze_towers", [True, False])
@pytest.mark.parametrize("modality", [None, "image"])
def test_no_gradient_is_missing(modality: str | None, freeze_towers: bool) -> None:
    model = tiny.model(freeze_towers=freeze_towers)
    found = gradients(model, prompts(modality))
    unused = [name for name, gradient in found.items() if gradient is None]
    # Parts of towers whose output nobody reads, as in any use of these towers.
    assert [name for name in unused if "_tower." not in name] == []
    absent = {"image": ("speech", "sound"), None: ("image", "speech", "sound")}[modality]
    for name in absent:
        connector = [g for n, g in found.items() if n.startswith(f"model.{name}_connector.")]
        assert connector
        assert not any(gradient.any() for gradient in connector)
    if not freeze_towers:
        assert any(n.startswith("model.audio_tower.") and g is not None for n, g in found.items())
    if modality == "image":
        assert any(g.any() for n, g in found.items() if n.startswith("model.image_connector."))


@pytest.mark.parametrize("name", ["everything", "moiie", "dynamic", "text-only"])
def test_the_loss_stays_the_same(name: str) -> None:
    model = twins.build(name)
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7, 8]])}
    torch.manual_seed(0)
    training = model.train()(**inputs, labels=inputs["input_ids"]).loss
    torch.manual_seed(0)
    with torch.no_grad():
        assert model(**inputs, labels=inputs["input_ids"]).loss == training.detach()


def test_evaluation_runs_no_idle_branch() -> None:
    model = tiny.model().eval()
    assert model(**prompts(None)).idle_branches is None
    model.train().requires_grad_(False)
    assert model(**prompts(None)).idle_branches is None
