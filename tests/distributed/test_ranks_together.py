"""What one rank meets and the other does not: media, unreadable samples."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_runs
import pytest
import rank_checks

from unimoe.trainers.data.bad_samples import FILE
from unimoe.trainers.parallel.settings import can_spread_experts

pytestmark = pytest.mark.skipif(not can_spread_experts(), reason="this release of transformers cannot spread experts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    parallel_runs.save_model(folder, "top_k")
    run = subprocess.run(
        [sys.executable, rank_checks.__file__, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    (folder / "log").write_text(run.stderr, encoding="utf-8")
    return folder


def told(folder: Path, check: str) -> list[dict[str, Any]]:
    files = [folder / f"{check}-{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), (folder / "log").read_text(encoding="utf-8")[-3000:]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def test_a_rank_with_media_does_not_wait_for_one_without(folder: Path) -> None:
    first, second = told(folder, "media")
    assert first == second  # ranks share out the gradients
    assert any(value for name, value in first.items() if "image_connector" in name)
    assert not any(value for name, value in first.items() if "speech_connector" in name)


@pytest.mark.parametrize("where", ["train", "evaluate"])
def test_bad_samples_of_all_ranks_count(folder: Path, where: str) -> None:
    first, second = (rank[where] for rank in told(folder, "bad"))
    allowed = rank_checks.ALLOWED * rank_checks.SAMPLES
    assert max(first["own"], second["own"]) <= allowed < first["own"] + second["own"]
    assert f"{rank_checks.BAD} of {rank_checks.SAMPLES} samples cannot be read" in first["said"]
    assert (first["said"], first["step"]) == (second["said"], second["step"])
    listed = [json.loads(line)["id"] for line in (folder / where / FILE).read_text(encoding="utf-8").splitlines()]
    assert sorted(listed) == [f"image-{index}" for index in range(rank_checks.BAD)]
