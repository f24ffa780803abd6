"""Experts spread over ranks: logits, gradients, steps and checkpoints are those of one process.

Two starts of ranks do everything; the tests look at what these left.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel_runs
import pytest
import torch
from safetensors.torch import load_file

from unimoe.trainers.parallel.settings import Parallel, can_spread_experts

pytestmark = pytest.mark.skipif(not can_spread_experts(), reason="this release of transformers cannot spread experts")

CASES = list(parallel_runs.CASES)
STEPS = 20
Found = dict[str, torch.Tensor]
Job = dict[str, Any]


def start_ranks(folder: Path, ranks: int, jobs: dict[str, Job]) -> None:
    """Run jobs one after the other in a single start of so many ranks."""
    file = folder / f"jobs-{ranks}.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(port), parallel_runs.__file__, str(folder), str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def steps_of(case: str) -> int:
    """Twenty steps for every kind of router; the others differ from them in one step already, if at all."""
    return STEPS if case in ("top_k", "grouped", "dynamic") else 3


def spread(ranks: int) -> Job:
    return {"data": ranks, "expert": ranks, "zero": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and four ranks found, in NAME-RANK.safetensors."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        parallel_runs.save_model(folder, case)
    parallel_runs.run(folder, "top_k", Parallel(), steps=2, save_at=2, out="by-one")
    resumed = {"case": "top_k", "steps": 2, "resume": True}
    two: dict[str, Job] = {case: {"case": case, "steps": steps_of(case)} for case in CASES}
    two["saved"] = {"case": "top_k", "steps": 2, "save_at": 2, "out": "by-two"}
    two["from-one"] = resumed | {"out": "by-one"}
    start_ranks(folder, 2, {name: job | {"parallel": spread(2)} for name, job in two.items()})
    four: dict[str, Job] = {f"{case}-4": {"case": case, "steps": 3} for case in ("grouped", "dynamic")}
    four["from-two"] = resumed | {"out": "by-two"}
    four = {name: job | {"parallel": spread(4)} for name, job in four.items()}
    four["half"] = {"case": "shared", "steps": 1, "parallel": {"data": 4, "expert": 2, "zero": 2}}
    start_ranks(folder, 4, four)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str, int], Found]:
    """Results of one process that takes the batches of so many ranks one after the other, each computed once."""
    found: dict[tuple[str, int], Found] = {}

    def of(case: str, ranks: int) -> Found:
        if (case, ranks) not in found:
            steps = steps_of(case) if ranks == 2 else 3
            found[case, ranks] = parallel_runs.run(folder, case, Parallel(), steps=steps, accumulation=ranks)
        return found[case, ranks]

    return of


def furthest(found: Found, expected: Found, kind: str) -> tuple[float, str]:
    """Largest difference relative to the largest value of the tensor, over all tensors of a kind."""
    names = [name for name in found if name.startswith(kind)]
    assert names
    return max(
        (float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-30)), n) for n in names
    )


@pytest.mark.parametrize("name", [*CASES, "grouped-4", "dynamic-4", "half"])
def test_spread_experts_train_as_on_one_process(folder: Path, alone: Callable[[str, int], Found], name: str) -> None:
    case = {"half": "shared"}.get(name, name.removesuffix("-4"))
    ranks = 2 if name in CASES else 4
    expected, found = alone(case, ranks), load_file(folder / f"{name}-0.safetensors")
    for rank in range(1, ranks):
        found |= load_file(folder / f"{name}-{rank}.safetensors")
    assert {n for n in expected if n.startswith("gradients/")} == {n for n in found if n.startswith("gradients/")}
    assert furthest(found, expected, "logits") < (1e-6, "")
    assert furthest(found, expected, "gradients") < (1e-6, "")
    steps = len(found["losses"])
    torch.testing.assert_close(found["losses"][:1], expected["losses"][:1], rtol=1e-6, atol=0)
    # What differs in the last digit after a step, later steps of this small random model enlarge.
    torch.testing.assert_close(found["losses"], expected["losses"][:steps], rtol=1e-3, atol=0)


def test_a_step_moves_weights_and_moments_as_on_one_process(folder: Path) -> None:
    expected = parallel_runs.run(folder, "shared", Parallel(), accumulation=4)
    found = load_file(folder / "half-0.safetensors")
    assert furthest(found, expected, "weights") < (1e-6, "")
    assert furthest(found, expected, "moments") < (2e-6, "")  # squares


def test_an_idle_rank_has_gradients_of_zero(folder: Path) -> None:
    found = load_file(folder / "idle-0.safetensors")
    gradient = found["gradients/model.language_model.layers.0.mlp.experts.down_proj"]
    assert bool(gradient[:2].any())
    assert not bool(gradient[2:].any())


@pytest.mark.parametrize("name", ["by-one", "by-two"])
def test_any_number_of_ranks_goes_on_from_a_checkpoint(folder: Path, name: str) -> None:
    written = {
        "by-two": load_file(folder / "saved-0.safetensors"),
        "by-one": parallel_runs.run(folder, "top_k", Parallel(), steps=2, resume=True, out="by-one"),
    }[name]
    read = {
        "by-two": [
            load_file(folder / "from-two-0.safetensors"),
            parallel_runs.run(folder, "top_k", Parallel(), steps=2, resume=True, out="by-two"),
        ],
        "by-one": [load_file(folder / "from-one-0.safetensors")],
    }[name]
    kept = [key for key in written if key.startswith(("weights/", "moments/"))]
    assert any(key.endswith("experts.gate_up_proj/exp_avg_sq") for key in kept)
    for other in read:
        assert [key for key in kept if not torch.equal(written[key], other[key])] == []


def test_a_checkpoint_of_ranks_holds_every_expert(folder: Path) -> None:
    saved = load_file(folder / "by-two" / "checkpoint-2" / "model.safetensors")
    layers = [name for name in saved if name.endswith(".mlp.experts.down_proj")]
    assert [saved[name].shape[0] for name in layers] == [4, 4]
