"""The Trainer: exact resume, whole checkpoints, losses apart, and stopping at the first loss that is not finite."""

import itertools
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from training_bench import ONLY_TEXT, Bench
from transformers import TrainerCallback

from unimoe import UniMoeForCausalLM
from unimoe.errors import CheckpointError, RecipeError, TrainingError
from unimoe.roles import role_of
from unimoe.trainers.planning.speed import seconds_per_step
from unimoe.trainers.recipe.recipe_parts import LoraSettings
from unimoe.trainers.saving.checkpoints import (
    COMPLETE_FILE,
    complete_checkpoints,
    newest_checkpoint,
    rotate,
    seal,
    verify,
)
from unimoe.trainers.saving.resumable import TRAINED_FILE
from unimoe.trainers.steps.lora import add_lora, merge_lora
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.trainer import UniMoeTrainer

ROLES = ["router", "experts", "connectors", "attention"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def plain(bench: Bench) -> Any:
    model = bench.model()
    set_trainable(model, ROLES)
    return model


def with_lora(bench: Bench) -> Any:
    model = bench.model()
    set_trainable(model, ["router", "connectors"])
    torch.manual_seed(0)
    return add_lora(model, LoraSettings(rank=2))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in merge_lora(model).state_dict().items()}


def losses(trainer: UniMoeTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", [plain, with_lora])
def test_a_resumed_run_is_bit_equal(bench: Bench, tmp_path: Path, make: Callable[[Bench], Any]) -> None:
    whole = bench.trainer(tmp_path / "whole", make(bench), 8)
    whole.train()
    expected = weights(whole.model)
    start = weights(make(bench))
    for role in ("router", "experts", "connectors", "attention"):
        changed = [name for name in expected if role_of(name) == role and not torch.equal(expected[name], start[name])]
        assert changed, f"nothing of {role} was trained"

    stopped = bench.trainer(tmp_path / "parts", make(bench), 8, save_strategy="steps", save_steps=4)
    stopped.train()
    # What was learned after step 4 must come from the resumed run.
    last = tmp_path / "parts" / "checkpoint-8"
    (last / COMPLETE_FILE).unlink()
    resumed = bench.trainer(tmp_path / "parts", make(bench), 8)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    got = weights(resumed.model)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


@pytest.mark.parametrize("make", [plain, with_lora])
def test_the_best_model_is_loaded_whole_at_the_end(bench: Bench, tmp_path: Path, make: Callable[[Bench], Any]) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "save_total_limit": 1, "eval_dataset": bench.dataset}
    trainer = bench.trainer(tmp_path, make(bench), 4, **options)
    at_step: dict[int, dict[str, torch.Tensor]] = {}

    def keep(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at_step[state.global_step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    # The second evaluation is the best one; the checkpoints after it are newer, and only one is kept beside it.
    scores = itertools.chain([3.0, 1.0, 2.0, 2.5], itertools.repeat(2.5))
    trainer.evaluate = lambda *a, **k: {"eval_loss": next(scores)}
    watcher = type("Watch", (TrainerCallback,), {"on_step_end": lambda self, *a, **k: keep(*a, **k)})()
    trainer.add_callback(watcher)
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    wrong = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, at_step[2][n])]
    assert wrong == []
    assert any(not torch.equal(at_step[2][n], at_step[4][n]) for n in at_step[2] if role_of(n) == "experts")


def test_a_checkpoint_of_a_plain_model_is_a_model_folder(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, plain(bench), 1, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = newest_checkpoint(tmp_path)
    loaded = UniMoeForCausalLM.from_pretrained(checkpoint)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert (checkpoint / "processor_config.json").is_file()


def test_losses_are_logged_apart_and_add_up(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, plain(bench), 4, logging_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["loss"] == pytest.approx(
            entry["ce_loss"] + 0.01 * entry["aux_loss"] + 0.01 * entry["z_loss"], rel=1e-4
        )
        assert 0.9 < entry["aux_loss"] < 4
        assert "modality_loss" not in entry  # not part of this model's loss


def test_losses_about_modalities_are_logged_where_they_count(bench: Bench, tmp_path: Path) -> None:
    text = {"modality_experts": {"image": [0], "text": [1]}, "router_modality_loss_coef": 0.3}
    model = tiny_training.model(
        bench.processor, sparse=True, router_aux_loss_coef=0.0, router_divergence_loss_coef=0.2, **text
    )
    set_trainable(model, ROLES)
    trainer = bench.trainer(tmp_path, model, 2, logging_steps=2)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    parts = entry["ce_loss"] + 0.3 * entry["modality_loss"] + 0.2 * entry["divergence_loss"]
    assert entry["loss"] == pytest.approx(parts, rel=1e-4)
    assert entry["modality_loss"] > 0


def test_accumulation_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        # Without the balance terms: they are means per micro batch, and the balance itself is not linear in the tokens.
        model = tiny_training.model(bench.processor, sparse=True, router_aux_loss_coef=0.0)
        set_trainable(model, ["attention", "experts", "router"])
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = bench.trainer(
            tmp_path,
            model,
            1,
            warmup_steps=0,
            modality_weights={"text": 1, "image": 0, "speech": 0, "sound": 0},
            **options,
        )
        trainer.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        trainer.train()
        results.append(weights(model))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


def test_roles_have_their_own_learning_rates(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(
        tmp_path, plain(bench), 10, learning_rates={"router": 0.5, "experts": 0.25}, weight_decay=0.1
    )
    trainer.create_optimizer_and_scheduler(10)
    groups = {
        (group["role"], group["weight_decay"] > 0): group["initial_lr"] for group in trainer.optimizer.param_groups
    }
    assert groups[("router", True)] == 0.5
    assert groups[("experts", True)] == 0.25
    assert groups[("attention", True)] == 1e-3
    assert groups[("connectors", False)] == 1e-3  # biases and norms do not decay
    factors = [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(11)]
    assert factors[0] == 0.0
    assert factors[2] == 1.0
    assert factors[10] == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_stops_in_the_same_step(bench: Bench, tmp_path: Path) -> None:
    def poison(sample: Any, states: Any, rng: Any) -> Any:
        if sample["id"] == "image-2":
            states = {"image": [tensor * float("nan") for tensor in states["image"]]}
        return sample, states

    model = plain(bench)
    trainer = bench.trainer(
        tmp_path, model, 8, augment=poison, modality_weights={"image": 1, "text": 3, "speech": 0, "sound": 0}
    )
    seen: list[dict[str, torch.Tensor]] = []
    check = trainer._get_grad_norm

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(weights(model))
        return check(*args, **kwargs)

    trainer._get_grad_norm = watched
    # Of every four steps one is of images, and each holds all four of them.
    bad_step = list(trainer.train_sampler().schedule()).index("image") + 1
    message = rf"loss is not finite at step {bad_step} on rank 0; .*the output of model\.image_connector.*image-2"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in seen[-1].items())


@pytest.mark.parametrize("allowed", [1, 2])
def test_steps_that_are_not_finite_are_left_out_as_often_as_allowed(
    bench: Bench, tmp_path: Path, allowed: int
) -> None:
    model = plain(bench)
    trainer = bench.trainer(tmp_path, model, 6, max_skipped_steps=allowed, modality_weights=ONLY_TEXT)
    compute, calls, states = trainer.compute_loss, [], []

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = compute(*args, **kwargs)
        return loss * float("inf") if trainer.state.global_step in (2, 3) else loss

    def after_step(*args: Any, **kwargs: Any) -> Any:
        states.append(weights(model))

    trainer.compute_loss = spoiled
    trainer.add_callback(type("Watch", (TrainerCallback,), {"on_step_end": after_step})())
    if allowed == 1:
        with pytest.raises(TrainingError, match=r"at step 4 .*1 steps were left out before"):
            trainer.train()
        return
    trainer.train()
    assert trainer.finite_guard.skipped == 2
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(states)]
    assert changed == [True, False, False, True, True]
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


def test_a_gradient_that_is_not_finite_is_traced_to_its_parameter(bench: Bench, tmp_path: Path) -> None:
    class Burst(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    model = plain(bench)
    layer = model.model.language_model.layers[1].self_attn.o_proj
    layer.register_forward_hook(lambda module, inputs, output: Burst.apply(output))
    trainer = bench.trainer(tmp_path, model, 2, modality_weights=ONLY_TEXT)
    before = weights(model)
    with pytest.raises(TrainingError, match=r"gradient norm is not finite at step 1 .*layers\.1\.self_attn\.o_proj"):
        trainer.train()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_batches_that_train_nothing_are_an_error(bench: Bench, tmp_path: Path) -> None:
    model = bench.model()
    set_trainable(model, ["connectors"])
    with pytest.raises(RecipeError, match=r"takes part in batches of 'text'.*leave these samples"):
        bench.trainer(tmp_path, model, 8).train()


def test_measuring_the_speed_leaves_no_trace(bench: Bench, tmp_path: Path) -> None:
    model = plain(bench)
    trainer = bench.trainer(tmp_path, model, 4)
    before, random_state = weights(model), torch.random.get_rng_state()
    assert 0 < seconds_per_step(trainer) < 5
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    trainer.train()
    untouched = bench.trainer(tmp_path, plain(bench), 4)
    untouched.train()
    assert losses(trainer) == losses(untouched)


def saved(folder: Path, step: int, files: int = 2) -> Path:
    written = folder / ".saving" / f"checkpoint-{step}"
    written.mkdir(parents=True)
    for index in range(files):
        (written / f"{index}.bin").write_bytes(bytes([step]) * 1000)
    seal(written, folder / written.name)
    return folder / written.name


def test_a_partial_checkpoint_is_ignored_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None
    good, partial = saved(tmp_path, 4), saved(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == partial
    (partial / COMPLETE_FILE).unlink()
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        assert newest_checkpoint(tmp_path) == good
    finally:
        logging.disable_propagation()
    assert f"{partial} is incomplete" in caplog.text


@pytest.mark.parametrize("damage", ["delete", "shorten", "change"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    checkpoint = saved(tmp_path, 4)
    file = checkpoint / "1.bin"
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(b"x" * (999 if damage == "shorten" else 1000))
    with pytest.raises(CheckpointError, match=r"1\.bin of the checkpoint .*checkpoint-4"):
        newest_checkpoint(tmp_path)


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        saved(tmp_path, step)
    rotate(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_saving_never_costs_more_than_one_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(0)
    for round_number in range(15):
        folder = tmp_path / str(round_number)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(1, 200):
                saved(folder, step, files=3)
                os.write(write_end, bytes([step]))
                rotate(folder, 2)
            os._exit(0)
        os.read(read_end, 1)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(write_end)
        reported = max(os.read(read_end, 1000) or b"\x01")
        os.close(read_end)
        newest = newest_checkpoint(folder)
        assert newest is not None
        for checkpoint in complete_checkpoints(folder):
            verify(checkpoint)
        assert int(newest.name.rpartition("-")[2]) >= reported


def test_adapters_of_another_run_are_refused(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path, with_lora(bench), 1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (newest_checkpoint(tmp_path) / TRAINED_FILE).is_file()
    assert json.loads((newest_checkpoint(tmp_path) / COMPLETE_FILE).read_text())[TRAINED_FILE]
    other = bench.model()
    set_trainable(other, ["router"])
    adapted = add_lora(other, LoraSettings(rank=2))
    with pytest.raises(CheckpointError, match="holds other trained parameters than this run"):
        bench.trainer(tmp_path, adapted, 2).train(resume_from_checkpoint=True)


def test_adapters_of_another_rank_are_refused(bench: Bench, tmp_path: Path) -> None:
    """Those of a larger one would fit when cut."""
    bench.trainer(tmp_path, with_lora(bench), 1, save_strategy="steps", save_steps=1).train()
    other = bench.model()
    set_trainable(other, ["router", "connectors"])
    smaller = add_lora(other, LoraSettings(rank=1, targets=["experts", "attention"]))
    with pytest.raises(CheckpointError, match=r"lora_A.* in the shape \[.*, but this run has \[.*settings of the run"):
        bench.trainer(tmp_path, smaller, 2).train(resume_from_checkpoint=True)
