"""`runs/eight_gpu.sh`: the commands that it makes, and a run of it on two processes."""

import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_training

import unimoe
from unimoe.trainers.parallel.settings import Parallel, can_spread_experts
from unimoe.trainers.recipe.recipe_file import load_recipe

SCRIPT = Path(unimoe.__file__).parent / "runs" / "eight_gpu.sh"
STEPS = [
    f"{stage}.{field}=1" for stage in ("connectors", "mixture") for field in ("steps", "gradient_accumulation_steps")
]
_STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > "$TOLD/$(basename "$0")"
exit "${FAILS:-0}"
"""


def run(arguments: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(SCRIPT), *arguments]
    merged = {**os.environ, **environment}
    return subprocess.run(command, env=merged, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment whose `unimoe` and `torchrun` only write down their arguments."""
    for name in ("unimoe", "torchrun"):
        (tmp_path / name).write_text(_STAND_IN, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told")}


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (4, 8), (2, 2)])
def test_every_machine_plans_and_then_starts_its_ranks(
    tmp_path: Path, stand_ins: dict[str, str], nodes: int, gpus: int
) -> None:
    (tmp_path / "told").mkdir()
    folders = [str(tmp_path / name) for name in ("a model", "data", "out")]
    changed = {"NODES": str(nodes), "GPUS": str(gpus), "HEAD": "10.0.0.1"}
    done = run([*folders, "--set", "seed=3"], **stand_ins, **changed)
    assert done.returncode == 0, done.stderr
    planned, started = ((tmp_path / "told" / name).read_text().splitlines() for name in ("unimoe", "torchrun"))
    assert planned == [*started[started.index("train") :], "--plan"]
    options = dict(zip(started[: started.index("-m")][::2], started[: started.index("-m")][1::2], strict=True))
    assert (options["--nnodes"], options["--nproc_per_node"]) == (str(nodes), str(gpus))
    assert options["--rdzv_endpoint"] == "10.0.0.1:29400"
    overrides = [value for flag, value in pairwise(planned) if flag == "--set"]
    recipe = load_recipe(Path(planned[1]), overrides)
    assert (recipe.model, recipe.media_root, recipe.data) == (*folders[:2], [f"{folders[1]}/train.jsonl"])
    assert planned[planned.index("--out") + 1] == folders[2]
    assert recipe.parallel == Parallel(data=nodes * gpus, expert=gpus, zero=3)
    assert recipe.seed == 3
    recipe.check()


def test_nothing_starts_where_the_plan_fails(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    (tmp_path / "told").mkdir()
    assert run(["model", "data", "out"], **stand_ins, FAILS="2").returncode == 2
    assert not (tmp_path / "told" / "torchrun").exists()


def test_without_arguments_it_says_how_to_start_it() -> None:
    done = run([])
    assert done.returncode == 2
    assert "runs/eight_gpu.sh MODEL DATA OUT" in done.stdout


@pytest.mark.skipif(not can_spread_experts(), reason="this release of transformers cannot spread experts")
def test_two_processes_train_both_stages(tmp_path: Path) -> None:
    processor = tiny_training.processor()
    tiny_training.write_jsonl(tmp_path / "data")
    tiny_training.model(processor, sparse=True).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folders = [str(tmp_path / name) for name in ("model", "data", "out")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    changes = [part for step in STEPS for part in ("--set", step)]
    done = run([*folders, *changes], GPUS="2", PORT=port, PATH=path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory on each of 2 ranks (data 2, expert 2, tensor 1, zero 3)" in done.stdout
    for stage in ("connectors", "mixture"):
        lines = (tmp_path / "out" / stage / "losses.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1]
    assert (tmp_path / "out" / "mixture" / "model" / "model.safetensors").is_file()
