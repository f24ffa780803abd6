"""The Trainer on the stand-in for CUDA: what a step of it waits for, and that it learns what it learns on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from cuda_stand_in import CUDA, CudaStandIn
from training_bench import Bench
from transformers import TrainerCallback, TrainingArguments

from unimoe.errors import TrainingError
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.trainer import UniMoeTrainer

ROLES = ["router", "experts", "connectors", "attention"]
STEPS = 4
# In a step of one batch. Those of the guard come after the backward pass: whether the losses and the gradients are finite.
A_STEP = {
    "encoding_unimoe.py:place_features": 1,
    "objective.py:training_loss": 1,
    "non_finite.py:_is_finite": 1,
    "non_finite.py:passes": 1,
}
# At a log: the sums of the losses, the losses by group, what was routed where, how far the routers went.
A_LOG = {"loss_meter.py:read": 2, "routing_statistics.py:read": 1, "telemetry.py:_drift": 1}


class StepWaits(TrainerCallback):
    """Our waits of every step but the first, from the end of the one before, and so with the log between them."""

    def __init__(self, cuda: CudaStandIn) -> None:
        self.cuda = cuda
        self.steps: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        waits = self.cuda.ours()
        if state.global_step > 1:
            self.steps.append(waits)


@contextmanager
def trainers_on_cuda() -> Iterator[CudaStandIn]:
    def device(args: TrainingArguments) -> torch.device:
        _ = args._setup_devices
        return CUDA

    with (
        CudaStandIn() as cuda,
        patch.object(TrainingArguments, "device", property(device)),
        patch.object(Accelerator, "device", CUDA),
    ):
        yield cuda


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def trainer_of(bench: Bench, folder: Path, **options: Any) -> UniMoeTrainer:
    model = bench.model()
    set_trainable(model, ROLES)
    return bench.trainer(folder, model, STEPS, **{"logging_steps": 3, "optim": "adamw_torch", **options})


def losses(trainer: UniMoeTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("batches", [1, 2])
def test_what_a_step_waits_for(bench: Bench, tmp_path: Path, batches: int) -> None:
    with trainers_on_cuda() as cuda:
        trainer = trainer_of(bench, tmp_path / "cuda", gradient_accumulation_steps=batches)
        waits = StepWaits(cuda)
        trainer.add_callback(waits)
        trainer.train()
        assert {parameter.device for parameter in trainer.model.parameters()} == {CUDA}
    once = A_STEP
    if batches > 1:  # looked at beforehand for the balance losses, then trained; the guard waits once for all
        once = A_STEP | {"encoding_unimoe.py:place_features": 2 * batches, "objective.py:training_loss": batches}
    collapse = {"routing_statistics.py:read": 1}  # looked for at every third step
    assert waits.steps == [once, once | collapse, once | A_LOG]
    if batches > 1:
        on_cpu = trainer_of(bench, tmp_path / "cpu", gradient_accumulation_steps=batches)
        on_cpu.train()
        assert losses(trainer) == pytest.approx(losses(on_cpu), rel=1e-4)


def test_a_step_that_is_not_finite_is_stopped(bench: Bench, tmp_path: Path) -> None:
    with trainers_on_cuda():
        trainer = trainer_of(bench, tmp_path)
        with torch.no_grad():
            trainer.model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        with pytest.raises(TrainingError, match=r"the weights of model\.language_model\.layers\.1\.mlp\.up_proj"):
            trainer.train()
