"""Experts and matrices spread over ranks: logits, gradients, training and checkpoints are those of one process.

One start of two ranks and one of four do everything; the tests look at what these left. `pytest -s` shows the differences.
"""

import json
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
STEPS, LORA_STEPS = 20, 5
Found = dict[str, torch.Tensor]
Job = dict[str, Any]


def spread(ranks: int) -> Job:
    return {"data": ranks, "expert": ranks, "zero": 3}


BOTH: Job = {"data": 2, "tensor": 2, "expert": 2, "zero": 3}
# FSDP2 divides float64 gradients twice where every expert is on one rank only, so those runs are in float32.
IN_FLOAT32: dict[str, Job] = {f"{case}-{n}": {"case": case, "parallel": spread(n)} for case in CASES for n in (2, 4)}
for name in ("mixers-4", "heads-2", "heads-4"):
    del IN_FLOAT32[name]
IN_FLOAT32["null-tensor-2"] = {"case": "null", "parallel": BOTH | {"expert": 4}}
IN_FLOAT32["lora-idle-2"] = {"case": "idle", "parallel": spread(2), "lora": True}
IN_FLOAT32["lora-fsdp"] = {"case": "top_k", "parallel": {"data": 2, "zero": 3, "engine": "fsdp"}, "lora": True}
IN_FLOAT64: dict[str, Job] = {
    "tensor-2": {"case": "dynamic", "parallel": {"tensor": 2}},
    "tensor-2-grouped": {"case": "grouped", "parallel": {"tensor": 2}},
    "tensor-2-expert-2": {"case": "shared", "parallel": {"tensor": 2, "expert": 2}},
    "tensor-2-expert-2-idle": {"case": "idle", "parallel": {"tensor": 2, "expert": 2}},
    "tensor-2-mixers": {"case": "mixers", "parallel": {"tensor": 2}},
    "tensor-2-heads": {"case": "heads", "parallel": {"tensor": 2}, "accumulation": 2},
    "data-4-expert-2": {"case": "dynamic", "parallel": {"data": 4, "expert": 2, "zero": 2}},
    "data-2-tensor-2-expert-2": {"case": "grouped", "parallel": BOTH},
    "data-2-tensor-2-expert-2-shared": {"case": "shared", "parallel": BOTH},
    "lora-tensor-2": {"case": "grouped", "parallel": {"tensor": 2}, "lora": True},
    "lora-tensor-2-expert-2": {"case": "shared", "parallel": {"tensor": 2, "expert": 2}, "lora": True},
    "lora-data-4-expert-2": {"case": "dynamic", "parallel": {"data": 4, "expert": 2, "zero": 2}, "lora": True},
    "lora-data-2-tensor-2": {
        "case": "heads",
        "parallel": {"data": 2, "tensor": 2, "zero": 2},
        "accumulation": 2,
        "lora": True,
    },
    "lora-data-2-tensor-2-expert-2": {"case": "grouped", "parallel": BOTH, "lora": True},
}
SAVED: dict[str, Job] = {
    "by-two": {"parallel": spread(2)},
    "by-tensor": {"parallel": {"tensor": 2}},
    "by-both": {"parallel": BOTH},
    "lora-by-tensor": {"parallel": {"tensor": 2}, "lora": True},
}
# Who goes on from whose checkpoint; one process reads every one.
RESUMED: dict[str, Job] = {
    "two-from-one": {"out": "by-one", "parallel": spread(2)},
    "tensor-from-two": {"out": "by-two", "parallel": {"tensor": 2, "expert": 2}},
    "four-from-two": {"out": "by-two", "parallel": spread(4)},
    "four-from-tensor": {"out": "by-tensor", "parallel": spread(4)},
    "four-from-both": {"out": "by-both", "parallel": spread(4)},
    "lora-four-from-tensor": {"out": "lora-by-tensor", "parallel": spread(4), "lora": True},
    "lora-two-from-one": {"out": "lora-by-one", "parallel": spread(2), "lora": True},
}


def steps_of(job: Job) -> int:
    return LORA_STEPS if job.get("lora") else STEPS


def all_jobs() -> dict[int, dict[str, Job]]:
    """Ranks -> name -> job."""
    jobs = {name: {"steps": steps_of(job), **job} for name, job in IN_FLOAT32.items()}
    jobs |= {name: {"steps": steps_of(job), "float64": True, **job} for name, job in IN_FLOAT64.items()}
    jobs |= {name: {"case": "top_k", "steps": 2, "save_at": 2, "out": name, **job} for name, job in SAVED.items()}
    jobs |= {name: {"case": "top_k", "steps": 2, "resume": True, **job} for name, job in RESUMED.items()}
    ranks = {name: Parallel(**job["parallel"]).ranks for name, job in jobs.items()}
    return {n: {name: job for name, job in jobs.items() if ranks[name] == n} for n in (2, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks found, in NAME-RANK.safetensors."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        parallel_runs.save_model(folder, case)
    for out in ("by-one", "lora-by-one"):
        parallel_runs.run(folder, "top_k", Parallel(), steps=2, save_at=2, out=out, lora=out.startswith("lora"))
    (folder / "jobs.json").write_text(json.dumps(all_jobs()), encoding="utf-8")
    command = [sys.executable, parallel_runs.__file__, str(folder), str(folder / "jobs.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[Job, bool], Found]:
    """What one process finds at the work of a job, computed once for all jobs that share it."""
    found: dict[tuple[Any, ...], Found] = {}

    def of(job: Job, float64: bool) -> Found:
        key = job["case"], float64, job.get("lora", False)
        if key not in found:
            case, float64, lora = key
            found[key] = parallel_runs.run(
                folder, case, Parallel(), steps_of(job), accumulation=1 if float64 else 2, float64=float64, lora=lora
            )
        return found[key]

    return of


def of_ranks(folder: Path, name: str) -> Found:
    """What the first rank found, and the others' logits. Weights that every rank has must be the same on all."""
    found, *others = (load_file(file) for file in sorted(folder.glob(f"{name}-[0-9].safetensors")))
    assert others
    for other in others:
        weights = [key for key in other if key.startswith("weights/")]
        assert [key for key in weights if not torch.equal(found[key], other[key])] == []
        found |= {key: value for key, value in other.items() if key.startswith("logits/")}
    return found


def furthest(found: Found, expected: Found, kind: str) -> tuple[float, str]:
    """Largest difference relative to the largest value of the tensor, over all tensors of a kind."""
    names = [name for name in found if name.startswith(kind)]
    assert names
    return max(
        (float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-30)), n) for n in names
    )


def show(name: str, found: Found, expected: Found, kinds: tuple[str, ...]) -> None:
    figures = [f"{kind} {furthest(found, expected, kind)[0]:.1e}" for kind in kinds]
    losses = float(((found["losses"] - expected["losses"]) / expected["losses"]).abs().max())
    print(f"{name}:", *figures, f"losses {losses:.1e}", sep="  ")


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_spread_experts_train_as_on_one_process(folder: Path, alone: Callable[[Job, bool], Found], name: str) -> None:
    expected, found = alone(IN_FLOAT32[name], False), of_ranks(folder, name)
    assert {n for n in expected if n.startswith("gradients/")} == {n for n in found if n.startswith("gradients/")}
    show(name, found, expected, ("logits", "gradients"))
    assert furthest(found, expected, "logits") < (1e-6, "")
    assert furthest(found, expected, "gradients") < (1e-6, "")
    assert len(found["losses"]) == len(expected["losses"]) == steps_of(IN_FLOAT32[name])
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_in_float64_nothing_but_rounding_differs(folder: Path, alone: Callable[[Job, bool], Found], name: str) -> None:
    """A wrong factor, or a batch that differs in a token, would show after twenty steps at the latest."""
    expected, found = alone(IN_FLOAT64[name], True), of_ranks(folder, name)
    assert expected.keys() - {f"logits/{text}" for text in range(4)} <= found.keys()
    show(name, found, expected, ("logits", "gradients", "weights", "moments"))
    for kind in ("logits", "gradients", "weights", "moments"):
        assert furthest(found, expected, kind) < (1e-12, ""), kind
    assert len(found["losses"]) == len(expected["losses"]) == steps_of(IN_FLOAT64[name])
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-13, atol=0)


def test_an_idle_rank_has_gradients_of_zero(folder: Path) -> None:
    gradient = of_ranks(folder, "idle-2")["gradients/model.language_model.layers.0.mlp.experts.down_proj"]
    assert bool(gradient[:2].any())
    assert not bool(gradient[2:].any())


@pytest.mark.parametrize("out", ["by-one", "lora-by-one", *SAVED])
def test_any_number_of_ranks_goes_on_from_a_checkpoint(folder: Path, out: str) -> None:
    with_lora = out.startswith("lora")
    by_one = parallel_runs.run(folder, "top_k", Parallel(), steps=2, resume=True, out=out, lora=with_lora)
    written = of_ranks(folder, out) if out in SAVED else by_one
    readers = {name: of_ranks(folder, name) for name, job in RESUMED.items() if job["out"] == out}
    # Adapters are merged in slices, whose products are rounded otherwise.
    kept = [key for key in written if key.startswith(("adapters/" if with_lora else "weights/", "moments/"))]
    assert any("experts" in key and key.endswith("/exp_avg_sq") for key in kept)
    for name, read in {"one": by_one, **readers}.items():
        assert [key for key in kept if not torch.equal(written[key], read[key])] == [], name


@pytest.mark.parametrize("out", [out for out in SAVED if not out.startswith("lora")])
def test_a_checkpoint_of_ranks_holds_every_expert(folder: Path, out: str) -> None:
    saved = load_file(folder / out / "checkpoint-2" / "model.safetensors")
    layers = [name for name in saved if name.endswith(".mlp.experts.down_proj")]
    assert [list(saved[name].shape) for name in layers] == [[4, 32, 48], [4, 32, 48]]
