"""The alarm for collapsed routers: within 10 steps when one is forced to an expert, and never without cause."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_training
import torch
from training_bench import Bench

from unimoe import UniMoeForCausalLM
from unimoe.errors import TrainingError
from unimoe.modeling_unimoe.configuration_unimoe_text import MODALITIES
from unimoe.modeling_unimoe.routing_unimoe import UniMoeRouter
from unimoe.trainers.recipe.telemetry_settings import TelemetrySettings
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.telemetry import telemetry
from unimoe.trainers.telemetry.collapse import WINDOW, WINDOWS, Collapse, CollapseWatch
from unimoe.trainers.telemetry.routing_statistics import RoutingCounts, RoutingRecorder

TOKENS = 200


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def force(model: UniMoeForCausalLM, layer: int, expert: int, by: float = 8.0) -> None:
    """The router of a layer sees every token prefer one expert, whatever it learns."""
    gate = model.model.language_model.layers[layer].mlp.gate
    rows = (gate.row_expert_R == expert).float() * by
    own_logits = gate._logits
    gate._logits = lambda x_TH: own_logits(x_TH) + rows  # type: ignore[method-assign]


def zero_routers(model: UniMoeForCausalLM) -> None:
    """As after upcycling: equal experts, and routers that prefer none."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, UniMoeRouter):
                module.weight.zero_()
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                parameter.copy_(parameter[:1].expand_as(parameter))


def alarms(bench: Bench, folder: Path, model: UniMoeForCausalLM, steps: int = 6, **options: Any) -> list[str]:
    """What a training of so many steps warns of."""
    set_trainable(model, ["router", "experts"])
    trainer = bench.trainer(folder, model, steps, **{"logging_steps": steps, **options})
    told: list[str] = []
    watch = trainer.telemetry._watch
    look = watch.look
    watch.look = lambda window: [told.append(str(c)) or c for c in look(window)]  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    return told


def test_a_forced_router_is_told_within_ten_steps(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(telemetry.logger, "warning", warnings.append)
    model = bench.model()
    force(model, 2, 3)
    (told,) = alarms(bench, tmp_path, model)
    assert told.startswith("layer 2: expert 3 takes 100 % of the ")
    assert "100 % of the text tokens" in told
    (warning,) = warnings
    assert f"at step {WINDOW * WINDOWS}: {told}" in warning


def test_a_run_can_stop_there(bench: Bench, tmp_path: Path) -> None:
    model = bench.model()
    force(model, 0, 1)
    set_trainable(model, ["router"])
    trainer = bench.trainer(tmp_path, model, 10, logging_steps=1)
    trainer.telemetry.settings = TelemetrySettings(on_collapse="stop")
    with pytest.raises(TrainingError, match=r"collapsed at step 6: layer 0: expert 1 takes 100 % of the .*tokens"):
        trainer.train()
    assert trainer.state.global_step == 6


def test_a_collapse_in_the_middle_is_told_within_ten_steps(bench: Bench, tmp_path: Path) -> None:
    for start in range(1, WINDOW + 1):
        watch = CollapseWatch(tiny.text_config())
        spread, stuck = window(text=[5, 5, 5, 5]), window(text=[20, 0, 0, 0])
        told = [
            step
            for step in range(WINDOW, 20, WINDOW)
            if watch.look(stuck if step - WINDOW + 1 >= start + 3 else spread)
        ]
        assert len(told) == 1
        assert told[0] - (start + 2) <= 10


@pytest.mark.parametrize("learning_rate", [1e-3, 2e-2])
def test_zero_routers_of_an_upcycled_model_are_no_collapse(bench: Bench, tmp_path: Path, learning_rate: float) -> None:
    model = bench.model()
    zero_routers(model)
    assert alarms(bench, tmp_path, model, learning_rate=learning_rate) == []


@pytest.mark.parametrize("zeros", [False, True])
def test_top_p_routing_is_no_collapse(bench: Bench, tmp_path: Path, zeros: bool) -> None:
    text = {"router_type": "dynamic", "router_top_p": 0.7}
    model = tiny_training.model(bench.processor, sparse=True, router_aux_loss_coef=0.01, **text)
    if zeros:
        zero_routers(model)
    assert alarms(bench, tmp_path, model) == []


def test_forced_top_p_routing_is(bench: Bench, tmp_path: Path) -> None:
    text = {"router_type": "dynamic", "router_top_p": 0.7}
    model = tiny_training.model(bench.processor, sparse=True, **text)
    gate = model.model.language_model.layers[2].mlp.gate
    own = gate.route
    weight = gate.weight

    def route(x_TH: torch.Tensor, mask_T: torch.Tensor | None = None) -> Any:
        return own(torch.ones_like(x_TH), mask_T)

    with torch.no_grad():
        weight.copy_(torch.zeros_like(weight))
        weight[1] = 0.5
    gate.route = route  # type: ignore[method-assign]
    (told,) = alarms(bench, tmp_path, model)
    assert told.startswith("layer 2: expert 1 takes 100 %")


def window(tokens: int = TOKENS, decided: float = 1.0, top_k: int = 2, **shares: list[float]) -> Any:
    """Counts of one layer's window: per modality how its tokens' first choices spread over the experts."""
    num_experts = len(next(iter(shares.values())))
    counts = RoutingCounts(1, 2, num_experts)
    for modality, row in shares.items():
        column = MODALITIES.index(modality)
        first = torch.tensor([*row, 0.0]) / sum(row) * tokens
        counts.tokens_NM[0, column] = tokens
        counts.first_LMX[0, column] = (first * decided).long()
        counts.decided_LMX[0, column] = (first * decided).long()
        second = torch.full((num_experts + 1,), tokens * (top_k - 1) / num_experts)
        counts.chosen_NLMX[0, 0, column] = (first + second).long()
    return counts


def tells(config: Any, *windows: Any) -> list[Collapse]:
    watch = CollapseWatch(config)
    return [collapse for window in windows for collapse in watch.look(window)]


def test_what_is_told_names_layer_modality_and_share() -> None:
    stuck = window(image=[0, 97, 3, 0], text=[0, 100, 0, 0])
    (collapse,) = tells(tiny.text_config(), stuck, stuck, stuck)
    assert collapse == Collapse(0, ("1",), {"text": 1.0, "image": pytest.approx(0.97)})
    assert str(collapse) == "layer 0: expert 1 takes 100 % of the text tokens, 97 % of the image tokens"


def test_experts_of_one_modality_are_no_collapse() -> None:
    stuck = window(image=[0, 100, 0, 0], text=[100, 0, 0, 0])
    assert tells(tiny.text_config(), *[stuck] * 4) == []
    # ... also where there are few tokens of the other; but too few say nothing.
    for few, expected in ((20, 0), (4, 1)):
        counts = window(text=[100, 0, 0, 0])
        other = window(tokens=few, image=[0, 100, 0, 0])
        for name in ("tokens_NM", "first_LMX", "decided_LMX", "chosen_NLMX"):
            getattr(counts, name).add_(getattr(other, name))
        assert len(tells(tiny.text_config(), *[counts] * 3)) == expected, few


def test_each_group_is_judged_by_itself() -> None:
    stuck = window(image=[0, 100, 0, 0], text=[0, 30, 30, 40])
    (collapse,) = tells(tiny.text_config(**tiny.MOIIE_GROUPS), *[stuck] * 3)
    assert collapse.shares == {"image": 1.0}


def test_few_tokens_and_undecided_ones_are_no_collapse() -> None:
    assert tells(tiny.text_config(), *[window(tokens=30, text=[100, 0, 0, 0])] * 4) == []
    assert tells(tiny.text_config(), *[window(decided=0.5, text=[100, 0, 0, 0])] * 4) == []


def test_all_tokens_on_the_same_pair_is_a_collapse() -> None:
    counts = window(top_k=1, text=[50, 50, 0, 0])
    counts.decided_LMX[0, 0] = torch.tensor([TOKENS, TOKENS, 0, 0, 0])
    counts.chosen_NLMX[0, 0, 0] = torch.tensor([TOKENS, TOKENS, 0, 0, 0])
    (collapse,) = tells(tiny.text_config(), *[counts] * 3)
    assert collapse.experts == ("0", "1")


def test_tokens_that_take_most_experts_are_no_collapse() -> None:
    counts = window(top_k=1, text=[40, 30, 30, 0])
    for tensor in (counts.decided_LMX[0], counts.chosen_NLMX[0, 0]):
        tensor[0] = torch.tensor([TOKENS, TOKENS, TOKENS, 0, 0])
    assert tells(tiny.text_config(num_experts_per_tok=3), *[counts] * 3) == []
    # Top-p: the first choice is always the same, but three are taken, and not the same three.
    counts = window(top_k=3, text=[100, 0, 0, 0])
    dynamic = {"router_type": "dynamic", "router_top_p": 0.7}
    assert tells(tiny.text_config(**dynamic), *[counts] * 3) == []
    assert len(tells(tiny.text_config(), *[counts] * 3)) == 1


def test_a_layer_that_recovered_is_told_again() -> None:
    stuck, spread = window(text=[100, 0, 0, 0]), window(text=[30, 30, 20, 20])
    assert len(tells(tiny.text_config(), *[stuck] * 6, spread, *[stuck] * 2)) == 2


def test_the_recorder_knows_ties(bench: Bench) -> None:
    model = bench.model()
    zero_routers(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(ids)
    counts = recorder.counts.read()
    assert counts.chosen_NLMX.sum() == 2 * 4 * 2
    assert counts.first_LMX.sum() == counts.decided_LMX.sum() == 0


def test_ignoring_reads_nothing(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, bench.model(), 1)
    watched = telemetry.Telemetry(trainer, TelemetrySettings(on_collapse="ignore"))
    watched.recorder.counts.read = None  # type: ignore[assignment,method-assign]
    trainer.state.global_step = WINDOW
    watched.on_step_end(trainer.args, trainer.state, trainer.control)
