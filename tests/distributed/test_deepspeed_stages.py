"""Experts one after the other, then adapters: DeepSpeed's ZeRO 1, 2 and 3 make of a recipe what DistributedDataParallel
makes of it, stopped in the middle and started again. One start of two ranks (gloo) makes all runs; `pytest -s` prints the
largest difference of every file.
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import staged_runs
from rank_launch import losses, torchrun
from safetensors.torch import load_file

# CI installs it; what a laptop may skip fails there.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None and not os.environ.get("CI"), reason="DeepSpeed is not installed"
)

ZERO = (1, 2, 3)
EXPERT_FILES = ("expert", "connectors", "router_means")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    staged_runs.write_start(folder)
    command = [*torchrun(2), staged_runs.__file__, str(folder), "plain", *(f"zero-{zero}" for zero in ZERO)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def assert_same(found: Path, expected: Path) -> None:
    tensors, wanted = load_file(found), load_file(expected)
    assert tensors.keys() == wanted.keys()
    differences = {name: float((tensors[name] - tensor).abs().max()) for name, tensor in wanted.items()}
    print(f"{found.parent.name}/{found.name}: {max(differences.values(), default=0):.1e}")
    assert not [name for name, difference in differences.items() if difference > 1e-6]


@pytest.mark.parametrize("zero", ZERO)
def test_experts_are_trained_one_after_the_other(folder: Path, zero: int) -> None:
    for expert in ("media", "text"):
        found, expected = (folder / name / "experts" / expert for name in (f"zero-{zero}", "plain"))
        assert losses(found) == pytest.approx(losses(expected), rel=1e-6)
        for file in EXPERT_FILES:
            assert_same(found / f"{file}.safetensors", expected / f"{file}.safetensors")


@pytest.mark.parametrize("zero", ZERO)
def test_adapters_train_go_on_and_are_merged(folder: Path, zero: int) -> None:
    found, expected = (folder / name / "mixture" for name in (f"zero-{zero}", "plain"))
    assert len(losses(expected)) == staged_runs.STOPPED_AT + 1
    assert losses(found) == pytest.approx(losses(expected), rel=1e-6)
    assert_same(found / "model" / "model.safetensors", expected / "model" / "model.safetensors")


@pytest.mark.parametrize("zero", ZERO)
def test_a_checkpoint_has_the_adapters_and_what_trains_beside_them(folder: Path, zero: int) -> None:
    found = folder / f"zero-{zero}-trained.safetensors"
    assert_same(found, folder / "plain-trained.safetensors")
    trained = load_file(found)
    assert all(tensor.any() for name, tensor in trained.items() if ".mlp.experts." in name)
    for part in (
        ".mlp.experts.lora_B.",
        ".experts.base_layer.lora_B.",
        ".q_proj.lora_B.",
        ".mlp.gate.",
        "image_connector",
    ):
        assert any(part in name for name in trained), part


@pytest.mark.parametrize("zero", ZERO)
def test_an_engine_lets_go_of_its_model(folder: Path, zero: int) -> None:
    models = json.loads((folder / f"zero-{zero}-models.json").read_text(encoding="utf-8"))
    assert models["experts/media"] == models["mixture"] > 0
