"""A step whose loss or gradient is not finite leaves nothing behind; overflows of half precision are told apart from faults."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_training
import torch
from training_bench import ONLY_TEXT, Bench
from transformers import TrainerCallback

from unimoe.errors import TrainingError
from unimoe.trainers.saving.checkpoints import newest_checkpoint
from unimoe.trainers.saving.optimizer_state import state_by_name
from unimoe.trainers.steps.non_finite import FiniteGuard
from unimoe.trainers.steps.router_bias import choice_biases
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.trainer import UniMoeTrainer


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def trainer(bench: Bench, folder: Path, steps: int, **options: Any) -> UniMoeTrainer:
    model = tiny_training.model(
        bench.processor, sparse=True, router_aux_loss_coef=0.1, router_bias_update_rate=0.01, attention_dropout=0.1
    )
    set_trainable(model, ["router", "experts", "attention"])
    return bench.trainer(folder, model, steps, **{"modality_weights": ONLY_TEXT, "warmup_steps": 0, **options})


def spoil(made: UniMoeTrainer, steps: set[int]) -> None:
    """Make the loss of these steps (from 0) not finite."""
    compute = made.compute_loss

    def loss(*args: Any, **kwargs: Any) -> Any:
        value = compute(*args, **kwargs)
        return value * float("inf") if made.state.global_step in steps else value

    made.compute_loss = loss


def at_step_ends(made: UniMoeTrainer, look: Callable[[], Any]) -> list[Any]:
    seen: list[Any] = []
    watch = {"on_step_end": lambda self, *args, **kwargs: seen.append(look())}
    made.add_callback(type("Watch", (TrainerCallback,), watch)())
    return seen


def state(made: UniMoeTrainer) -> dict[str, torch.Tensor]:
    """Weights, biases of routers, and the optimizer's moments and counters."""
    moments = state_by_name(made.optimizer, made.model)["state"]
    flat = {f"{name}.{key}": value.clone() for name, own in moments.items() for key, value in own.items()}
    return flat | {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_left_out_moves_nothing(bench: Bench, tmp_path: Path, accumulation: int) -> None:
    options = {"gradient_accumulation_steps": accumulation, "logging_steps": 2, "logging_first_step": True}
    made = trainer(bench, tmp_path, 5, max_skipped_steps=2, **options)
    spoil(made, {2, 3})
    states = at_step_ends(made, lambda: state(made))
    made.train()
    biases = set(choice_biases(made.model))
    assert biases <= changed(states[0], states[1])
    assert changed(states[1], states[2]) == changed(states[2], states[3]) == set()
    assert biases <= changed(states[3], states[4])
    logs = {entry["step"]: entry for entry in made.state.log_history if "learning_rate" in entry}
    # Step 4 ends a window of two steps that were both left out: nothing was measured.
    assert "loss" not in logs[4]
    assert "grad_norm" not in logs[4]
    assert logs[4]["skipped_steps"] == 2
    assert all(math.isfinite(logs[step]["loss"]) for step in (1, 2))


def test_means_are_over_the_steps_that_were_made(bench: Bench, tmp_path: Path) -> None:
    """Stock trainers count a lost step as a loss of 0."""
    logs = []
    for every in (1, 4):
        made = trainer(bench, tmp_path, 4, max_skipped_steps=1, logging_steps=every)
        spoil(made, {1})
        made.train()
        logs.append([entry for entry in made.state.log_history if "ce_loss" in entry])
    alone, (together,) = logs
    assert [entry["step"] for entry in alone] == [1, 3, 4]
    for name in ("loss", "ce_loss", "aux_loss", "aux_loss_balanced"):
        assert together[name] == pytest.approx(sum(entry[name] for entry in alone) / 3, rel=1e-5)


def test_the_last_checkpoint_is_untouched_when_a_run_stops(bench: Bench, tmp_path: Path) -> None:
    made = trainer(bench, tmp_path, 5, save_strategy="steps", save_steps=2)
    spoil(made, {3})
    with pytest.raises(TrainingError, match=r"not finite at step 4 on rank 0; .* Samples of the batch: text-\d"):
        made.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    again = trainer(bench, tmp_path, 5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


# --- half precision ----------------------------------------------------------------------------------------------------


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> Callable[[UniMoeTrainer, float], Any]:
    """Let a Trainer on a CPU do what it does on GPUs: float16 autocast, and gradients that are scaled up."""

    def set_up(made: UniMoeTrainer, scale: float) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-40)
        monkeypatch.setattr(made.accelerator.state, "_mixed_precision", "fp16")
        monkeypatch.setattr(made.accelerator, "native_amp", True)
        monkeypatch.setattr(made.accelerator, "scaler", scaler)
        return scaler

    return set_up


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_overflow_of_scaled_gradients_is_no_fault(bench: Bench, tmp_path: Path, float16: Any, clip: float) -> None:
    made = trainer(bench, tmp_path, 2, max_grad_norm=clip)
    scaler = float16(made, 2.0**45)
    states = at_step_ends(made, lambda: (state(made), scaler.get_scale()))
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.train()
    (first, first_scale), (second, second_scale) = states
    assert changed(before, first) == set()
    assert first_scale == second_scale == 2.0**5
    assert set(choice_biases(made.model)) <= changed(first, second)
    assert made.finite_guard.skipped == 0


def test_an_overflow_without_scale_is_one(bench: Bench, tmp_path: Path, float16: Any) -> None:
    made = trainer(bench, tmp_path, 2)
    float16(made, 1.0)
    made.model.model.language_model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda module, inputs, output: output * 1e6  # too large for float16 only
    )
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    with pytest.raises(
        TrainingError, match=r"loss is not finite at step 1 .*the output of .*layers\.1\.self_attn\.o_proj"
    ):
        made.train()
    assert changed(before, made.model.state_dict()) == set()


def test_a_loss_that_is_not_finite_is_left_out_under_scaling_too(bench: Bench, tmp_path: Path, float16: Any) -> None:
    made = trainer(bench, tmp_path, 3, max_skipped_steps=1)
    float16(made, 2.0)

    class Burst(TrainerCallback):
        """Weights of the head that make logits infinite, in the second step only."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.hook = made.model.lm_head.register_forward_hook(
                lambda module, inputs, output: output * (float("nan") if state.global_step == 1 else 1.0)
            )

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.hook.remove()

    made.add_callback(Burst())
    states = at_step_ends(made, lambda: state(made))
    made.train()
    assert changed(states[0], states[1]) == set()
    assert changed(states[1], states[2]) >= set(choice_biases(made.model))
    assert made.finite_guard.skipped == 1


def test_bfloat16_stops_at_the_first_bad_module(bench: Bench, tmp_path: Path) -> None:
    made = trainer(bench, tmp_path, 2, bf16=True)
    made.model.model.language_model.layers[1].mlp.register_forward_hook(
        lambda module, inputs, output: output * float("inf")
    )
    with pytest.raises(TrainingError, match=r"loss is not finite at step 1 .*the output of .*layers\.1\.mlp"):
        made.train()


def test_under_deepspeed_a_run_ends_because_the_step_has_been_made() -> None:
    trainer = SimpleNamespace(
        is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(num_processes=1),
        state=SimpleNamespace(global_step=4),
        args=SimpleNamespace(process_index=1),
    )
    guard = FiniteGuard(max_skipped=3)
    guard.add({"sample_ids": ["text-7"]}, {}, torch.tensor(1.0))
    assert guard.passes(trainer, 1.0)
    guard.add({"sample_ids": ["text-8"]}, {}, torch.tensor(math.nan))
    with pytest.raises(
        TrainingError, match=r"loss .* step 5 on rank 1\. DeepSpeed has made .*\(text-8\).*last checkpoint"
    ):
        guard.passes(trainer, math.nan)
