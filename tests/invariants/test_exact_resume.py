"""A run that was killed and goes on ends where one ends that was never stopped: every bit of what it depends on."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from training_bench import Bench
from transformers import TrainerCallback

from unimoe.roles import role_of
from unimoe.trainers.recipe.recipe_parts import LoraSettings
from unimoe.trainers.saving.optimizer_state import state_by_name
from unimoe.trainers.saving.random_state import random_state
from unimoe.trainers.steps.balance_decay import BalanceDecay
from unimoe.trainers.steps.lora import add_lora
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.trainer import UniMoeTrainer

STEPS = 6
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def model(bench: Bench) -> Any:
    """Dropout draws random numbers in every layer, router biases move, and the balance weight falls."""
    routing = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "router_bias_update_rate": 0.01}
    return tiny_training.model(bench.processor, sparse=True, attention_dropout=0.1, **routing)


def full(bench: Bench) -> Any:
    made = model(bench)
    set_trainable(made, ["router", "experts", "connectors", "attention", "norms"])
    return made


def lora(bench: Bench) -> Any:
    made = model(bench)
    set_trainable(made, ["router", "connectors"])
    torch.manual_seed(0)
    return add_lora(made, LoraSettings(rank=2))


def frozen(bench: Bench) -> Any:
    """Only routers and what lies between towers and decoder."""
    made = model(bench)
    set_trainable(made, ["router", "connectors"])
    return made


def trainer(bench: Bench, folder: Path, make: Callable[[Bench], Any], **options: Any) -> UniMoeTrainer:
    common: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 4}
    common |= {"save_strategy": "steps", "save_steps": 2, "learning_rates": {"router": 1e-2, "connectors": 2e-3}}
    made = bench.trainer(folder, make(bench), STEPS, **{**common, **options})
    made.add_callback(BalanceDecay(made.base.config.text_config, 0.01, STEPS))
    return made


# Figures of the machine, which no run has twice.
MEASURED = ("tokens_per_second", "memory_gb")


class Killed(TrainerCallback):
    """Ends the process in step `step`, without any cleaning up."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill(make: Callable[[], UniMoeTrainer], step: int) -> None:
    """Train in a copy of this process that is killed; the Trainer is made there, since forks seed their numbers anew."""
    child = os.fork()
    if child == 0:
        made = make()
        made.add_callback(Killed(step))
        made.train()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def everything(made: UniMoeTrainer) -> dict[str, Any]:
    """What a run leaves, by name."""
    return {
        "weights": dict(made.model.state_dict()),
        "optimizer": state_by_name(made.optimizer, made.model),
        "schedule": made.lr_scheduler.state_dict(),
        "random": random_state(),
        "coefficient": made.base.config.text_config.router_aux_loss_coef,
        "losses": [
            {name: value for name, value in entry.items() if name not in MEASURED}
            for entry in made.state.log_history
            if "ce_loss" in entry
        ],
        "best": (made.state.best_metric, made.state.best_global_step),
        "step": made.state.global_step,
    }


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Places at which two nested states are not the same to the last bit."""
    if isinstance(one, dict):
        keys = one.keys() ^ other.keys()
        return [*map(str, keys)] + [
            d for key in one.keys() - keys for d in differences(one[key], other[key], f"{place}/{key}")
        ]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [place]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{place}/{i}")]
    if hasattr(one, "shape"):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [place]
    return [] if one == other else [place]


@pytest.mark.parametrize("make", [full, lora, frozen])
def test_a_killed_run_ends_bit_equal(bench: Bench, tmp_path: Path, make: Callable[[Bench], Any]) -> None:
    start = {name: tensor.clone() for name, tensor in make(bench).state_dict().items()}
    whole = trainer(bench, tmp_path / "whole", make)
    whole.train()
    expected = everything(whole)
    moved = {name for name, tensor in expected["weights"].items() if not torch.equal(tensor, start[name])}
    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    biases = {name for name in start if name.endswith("choice_bias_C")}
    # The bias of a connector whose modality no step held may stay.
    assert {role_of(name) for name in trained} == {role_of(name) for name in moved & trained}
    assert len(biases) == 2
    assert biases < moved <= trained | biases

    kill(lambda: trainer(bench, tmp_path / "parts", make), 4)
    resumed = trainer(bench, tmp_path / "parts", make)
    seen: list[int] = []
    begin = type(
        "Begin",
        (TrainerCallback,),
        {"on_step_begin": lambda self, args, state, *a, **k: seen.append(state.global_step)},
    )
    resumed.add_callback(begin())
    resumed.train(resume_from_checkpoint=True)
    assert seen == [4, 5]
    assert differences(expected, everything(resumed)) == []


def test_the_look_ahead_of_the_first_resumed_step_draws_the_same_numbers(bench: Bench, tmp_path: Path) -> None:
    """With accumulation, choices of experts are counted before the Trainer restores its random numbers."""
    counted: list[list[torch.Tensor]] = []
    for folder, resume in (("whole", False), ("parts", True)):
        if resume:
            kill(lambda: trainer(bench, tmp_path / "parts", full), 2)
        made = trainer(bench, tmp_path / folder, full)
        totals: list[torch.Tensor] = []
        begin = made.step_balance.begin

        def spy(*args: Any, begin: Any = begin, made: Any = made, totals: Any = totals) -> None:
            begin(*args)
            totals.append(made.step_balance.totals.chosen_LC.clone())

        made.step_balance.begin = spy
        made.train(resume_from_checkpoint=resume)
        counted.append(totals[-(STEPS - 2) :])
    assert differences(counted[0], counted[1]) == []


@pytest.mark.parametrize(("every", "killed_at"), [(3, 4), (4, 5)], ids=["within", "between"])
def test_passes_over_the_data_go_on_within_and_between(
    bench: Bench, tmp_path: Path, every: int, killed_at: int
) -> None:
    """A pass has 4 steps; at its start the data loader draws a random number."""

    def of_two_passes(folder: Path) -> UniMoeTrainer:
        options = {"max_steps": -1, "num_train_epochs": 2, "save_steps": every, "logging_steps": 1}
        return bench.trainer(folder, frozen(bench), -1, save_strategy="steps", **options)

    whole = of_two_passes(tmp_path / "whole")
    whole.train()
    expected = everything(whole)
    assert expected["step"] == 8
    kill(lambda: of_two_passes(tmp_path / "parts"), killed_at)
    resumed = of_two_passes(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert differences(expected, everything(resumed)) == []


@pytest.mark.parametrize("make", [full, lora])
def test_the_best_model_survives_a_kill_and_a_move(bench: Bench, tmp_path: Path, make: Callable[[Bench], Any]) -> None:
    """The best one was saved before the kill; the resumed run finds it, although its folder has another name now."""
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {"save_total_limit": 1, "eval_dataset": bench.dataset}

    def judged(folder: Path) -> UniMoeTrainer:
        made = trainer(bench, folder, make, **options)
        made.evaluate = lambda *a, **k: {"eval_loss": {2: 1.0, 4: 2.0, 6: 3.0}[made.state.global_step]}
        return made

    whole = judged(tmp_path / "whole")
    whole.train()
    expected = everything(whole)
    assert whole.state.best_global_step == 2
    kill(lambda: judged(tmp_path / "parts"), 5)
    (tmp_path / "parts").rename(tmp_path / "moved")
    resumed = judged(tmp_path / "moved")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")
    assert differences(expected, everything(resumed)) == []


def test_a_skipped_step_counts_after_a_kill_too(bench: Bench, tmp_path: Path) -> None:
    """How many steps were left out is part of a checkpoint: else each restart would allow as many again."""

    def spoiled(folder: Path) -> UniMoeTrainer:
        made = trainer(bench, folder, frozen, max_skipped_steps=2, save_steps=1, logging_steps=1)
        compute = made.compute_loss

        def loss(*args: Any, **kwargs: Any) -> Any:
            value = compute(*args, **kwargs)
            return value * float("nan") if made.state.global_step in (1, 3) else value

        made.compute_loss = loss
        return made

    whole = spoiled(tmp_path / "whole")
    whole.train()
    expected = everything(whole)
    kill(lambda: spoiled(tmp_path / "parts"), 4)
    resumed = spoiled(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert whole.finite_guard.skipped == resumed.finite_guard.skipped == 2
    assert differences(expected, everything(resumed)) == []
    state = json.loads((tmp_path / "parts" / "checkpoint-6" / "process_0.json").read_text())
    assert ["skipped", 2] in state["dict"]
