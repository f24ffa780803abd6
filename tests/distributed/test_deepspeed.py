"""DeepSpeed's ZeRO 1, 2 and 3 on two ranks (gloo, no compiler) train what plain data parallelism trains, save all of it,
and go on.

One start of ranks makes all runs that are compared; a recipe is killed and started again in two more.
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import parallel_runs
import pytest
import tiny_training
import torch
from rank_launch import kill_rank_after_a_checkpoint, losses, torchrun, train_command
from safetensors.torch import load_file

from unimoe import UniMoeForCausalLM
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.parallel.settings import Parallel
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_file import save_recipe

# CI installs it; what a laptop may skip fails there.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None and not os.environ.get("CI"), reason="DeepSpeed is not installed"
)

ZERO = (1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of plain data parallelism; under every kind of ZeRO two, and after a resume two more."""
    folder = tmp_path_factory.mktemp("ranks")
    parallel_runs.save_model(folder, "shared")
    jobs: dict[str, Any] = {"plain": {"case": "shared", "steps": 4, "parallel": {"data": 2}}}
    for zero in ZERO:
        job = {"case": "shared", "save_at": 2, "out": f"zero-{zero}", "parallel": {"data": 2, "zero": zero}}
        jobs |= {f"begun-{zero}": job | {"steps": 2}, f"zero-{zero}": job | {"steps": 4, "resume": True}}
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    command = [*torchrun(2), parallel_runs.__file__, str(folder), str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.parametrize("zero", ZERO)
def test_zero_trains_as_plain_data_parallelism_does_and_goes_on(folder: Path, zero: int) -> None:
    expected, found = load_file(folder / "plain-0.safetensors"), load_file(folder / f"zero-{zero}-0.safetensors")
    assert len(expected["losses"]) == 4
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=0)
    names = [name for name in expected if name.startswith("weights/")]
    assert names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("zero", ZERO)
def test_a_checkpoint_of_zero_has_every_weight(folder: Path, zero: int) -> None:
    checkpoint = folder / f"zero-{zero}" / "checkpoint-4"
    saved, found = load_file(checkpoint / "model.safetensors"), load_file(folder / f"zero-{zero}-0.safetensors")
    text = UniMoeForCausalLM.from_pretrained(checkpoint).config.text_config
    for packed in ("gate_up_proj", "down_proj"):
        experts = [saved[name].shape[0] for name in saved if name.endswith(f".mlp.experts.{packed}")]
        assert sum(experts) == text.num_experts * len(text.sparse_layers) > 0
    trained = {name.removeprefix("weights/"): tensor for name, tensor in found.items() if name.startswith("weights/")}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())


def recipe(start: Path, out: Path, parallel: Parallel) -> Recipe:
    stage = StageConfig(
        "mixture",
        "train",
        ["router", "experts", "connectors"],
        modalities=["image", "text", "speech"],
        steps=6,
        batch_size=8 // parallel.data,
        learning_rate=1e-3,
        save_every=2,
        log_every=1,
    )
    return Recipe(str(start / "model"), [str(start / "train.jsonl")], str(out), parallel=parallel, stages=[stage])


def test_a_recipe_whose_rank_is_killed_ends_and_goes_on_to_whole_weights(tmp_path: Path) -> None:
    processor = tiny_training.processor()
    tiny_training.write_jsonl(tmp_path, per_modality=8)
    tiny_training.model(processor, sparse=True).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    parallel = Parallel(data=2, zero=3)
    save_recipe(recipe(tmp_path, tmp_path / "two", parallel), tmp_path / "two.yaml")
    command = train_command(tmp_path / "two.yaml", parallel)
    kill_rank_after_a_checkpoint(command, tmp_path / "two" / "mixture" / "checkpoints", tmp_path / "log")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    run_curriculum(recipe(tmp_path, tmp_path / "one", Parallel()), progress_bar=False)
    found, expected = losses(tmp_path / "two" / "mixture"), losses(tmp_path / "one" / "mixture")
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    # AdamW makes whole steps of gradients that are rounding only.
    assert found == pytest.approx(expected, rel=1e-2)
    saved, whole = (load_file(tmp_path / out / "mixture" / "model" / "model.safetensors") for out in ("two", "one"))
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: t.shape for name, t in whole.items()}
