"""Counts of routing decisions, and the figures made of them, against a plain recount."""

import math
from typing import Any

import pytest
import tiny
import torch

from unimoe import UniMoeForCausalLM
from unimoe.errors import UniMoeError
from unimoe.modeling_unimoe.configuration_unimoe_text import MODALITIES
from unimoe.modeling_unimoe.routing_unimoe import UniMoeRouter
from unimoe.trainers.steps.router_bias import choice_biases
from unimoe.trainers.telemetry import routing_statistics
from unimoe.trainers.telemetry.routing_figures import ExpertLoad, co_activation, load_change
from unimoe.trainers.telemetry.routing_statistics import RoutingRecorder

ROUTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": tiny.MOIIE_GROUPS,
    "null": {"num_null_experts": 1},
    "shared": {"num_shared_experts": 1},
    "biased": {"router_bias_update_rate": 0.01},
    "top_p": {"router_type": "dynamic", "router_top_p": 0.7, "num_null_experts": 2, "num_shared_experts": 1},
}
IDS = torch.tensor([tiny.prompt(5, "image", 7, 8, 9, "audio", 3), [0] * 2 + tiny.prompt("image", 3, "audio", 9, 9)])
MASK = (IDS != 0).long()


def made(name: str) -> tuple[UniMoeForCausalLM, dict[str, torch.Tensor]]:
    model = tiny.model(ROUTERS[name])
    for bias in choice_biases(model).values():
        bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
    return model, tiny.media(images=2, windows=2)


def test_a_model_whose_routers_are_of_another_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of models from the code in their folder are."""
    monkeypatch.setattr(routing_statistics, "UniMoeRouter", torch.nn.Bilinear)
    with pytest.raises(UniMoeError, match="import unimoe before from_pretrained"):
        RoutingRecorder(made("plain")[0])


@pytest.mark.parametrize("name", ROUTERS)
def test_counts_equal_a_recount(name: str) -> None:
    model, media = made(name)
    decisions: list[torch.Tensor] = []
    for router in (module for module in model.modules() if isinstance(module, UniMoeRouter)):
        router.register_forward_hook(lambda module, inputs, output: decisions.append(output[2]))
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK, **media)
    counts, config = recorder.counts.read(), model.config.text_config
    modalities = model.model.modality_ids(IDS)
    valid = MASK.bool().reshape(-1)
    expected = torch.bincount(modalities.reshape(-1)[valid], minlength=5)
    assert counts.tokens_NM[0].equal(expected)
    for layer, index in enumerate(decisions):
        for modality in range(5):
            own = index[valid & (modalities.reshape(-1) == modality)]
            per_expert = torch.stack([(own == expert).sum() for expert in range(4)])
            assert counts.chosen_NLMX[0, layer, modality, :4].equal(per_expert), (layer, modality)
        for a in range(4):
            both = ((index == 0).any(1) & (index == a).any(1) & valid).sum()
            assert counts.together_LXX[layer, 0, a] == both
    routed = torch.stack([torch.bincount(index[valid].flatten(), minlength=7)[:4] for index in decisions])
    figures = ExpertLoad.of(config, counts.tokens_NM[0], counts.chosen_NLMX[0])
    torch.testing.assert_close(figures.layer_shares, (routed / routed.sum(1, keepdim=True)).double())
    nulls = counts.chosen_NLMX[0, ..., 4].sum()
    assert (nulls > 0) == (name in ("null", "top_p"))
    if name != "top_p":
        assert counts.chosen_NLMX.sum() == 2 * 2 * valid.sum()  # two layers, two choices


def test_autocast_counts_exactly() -> None:
    """In bfloat16 there is no 637."""
    model, _ = made("plain")
    ids = torch.full((7, 91), 7)
    with RoutingRecorder(model) as recorder, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids)
    counts = recorder.counts.read()
    assert counts.tokens_NM.sum() == 637
    assert counts.chosen_NLMX.sum() == 2 * 2 * 637
    assert counts.together_LXX.diagonal(dim1=1, dim2=2).sum() == 2 * 2 * 637


def test_training_only_means_passes_with_gradients() -> None:
    model, _ = made("plain")
    recorder = RoutingRecorder(model, in_training_only=True)
    with recorder:
        model.train()(IDS[:, :1])
        with torch.no_grad():
            model(IDS[:, :1])
        model.eval()(IDS[:, :1])
    model.train()(IDS[:, :1])  # detached
    assert recorder.counts.tokens_NM.sum() == 2


def test_generation_is_counted_once_per_token() -> None:
    model, _ = made("plain")
    with RoutingRecorder(model) as recorder:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert recorder.counts.tokens_NM.sum() == 3 + 3  # the last token is never read


def test_tasks_are_counted_apart_and_readings_subtract() -> None:
    model, _ = made("plain")
    with RoutingRecorder(model, ["a", "b"]) as recorder, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
        first = recorder.counts.read()
        recorder.task = 1
        model(torch.tensor([[5, 6]]))
    both = recorder.counts.read()
    assert both.tokens_NM[:, 0].tolist() == [3, 2]
    assert both.since(first).tokens_NM[:, 0].tolist() == [0, 2]
    assert both.since(first).chosen_NLMX[0].sum() == 0
    assert both.since(None) is both


def test_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("plain")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    alone = recorder.counts.read()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))
    both = recorder.counts.read(over_ranks=True, only=("tokens_NM", "together_LXX"))
    assert both.tokens_NM.equal(2 * alone.tokens_NM)
    assert both.together_LXX.equal(2 * alone.together_LXX)
    assert recorder.counts.read().tokens_NM.equal(alone.tokens_NM)  # this rank's own stay


def test_dense_models_have_tokens_only() -> None:
    model = tiny.model({"num_experts": 0, "sparse_layers": []})
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert recorder.counts.read().tokens_NM.sum() == 3


def load(chosen: dict[str, list[float]], tokens: int = 1000, **text: Any) -> ExpertLoad:
    config = tiny.text_config(sparse_layers=[1], **text)
    counts = torch.zeros(1, 5, 5)
    for modality, row in chosen.items():
        counts[0, MODALITIES.index(modality), : len(row)] = torch.tensor(row)
    return ExpertLoad.of(config, [tokens if name in chosen else 0 for name in MODALITIES], counts)


def test_figures_of_a_known_load() -> None:
    figures = load({"text": [300.0, 100, 0, 0], "image": [0.0, 100, 300, 0]})
    assert figures.layers == [1]
    assert figures.shares[0, 0].tolist() == [0.75, 0.25, 0, 0]
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert figures.entropies[0][:2] == [pytest.approx(quarter), pytest.approx(quarter)]
    assert figures.entropies[0][2] is None  # no video
    whole = [3 / 8, 2 / 8, 3 / 8]
    assert figures.layer_entropies == [pytest.approx(-sum(p * math.log(p) for p in whole) / math.log(4))]
    assert figures.max_ratios == [1.5]
    assert figures.dead == [[3]]
    assert figures.experts_per_token[0, 0] == 0.4


def test_a_group_is_even_over_its_own_experts() -> None:
    figures = load({"image": [100.0, 100, 100, 0], "text": [0.0, 100, 100, 100]}, **tiny.MOIIE_GROUPS)
    assert figures.layer_entropies == [pytest.approx(1.0)]
    assert figures.max_ratios == [pytest.approx(1.0)]
    assert figures.dead == [[]]
    # Images alone say nothing about the expert that they may not choose.
    assert load({"image": [300.0, 0, 0, 0]}, **tiny.MOIIE_GROUPS).dead == [[1, 2]]


def test_few_tokens_tell_nothing() -> None:
    figures = load({"text": [9.0, 0, 0, 0]}, tokens=9)
    assert figures.layer_entropies == [None]
    assert figures.dead == [[]]
    assert load({}).max_ratios == [None]


def test_null_choices_are_no_load() -> None:
    figures = load({"text": [100.0, 100, 100, 100, 400]}, num_null_experts=1)
    assert figures.layer_entropies == [pytest.approx(1.0)]
    assert figures.null_shares[0, 0] == 0.5


def test_moved_choices_and_co_activation() -> None:
    before, after = load({"text": [100.0, 0, 0, 0], "image": [1.0, 0, 0, 0]}), load({"text": [50.0, 25, 25, 0]})
    assert load_change(before, after) == [[0.5, None, None, None, None]]
    together = torch.tensor([[[4, 2, 0], [2, 8, 1], [0, 1, 1]]])
    assert co_activation(together).tolist() == [[[1.0, 0.5], [0.25, 1.0]]]
