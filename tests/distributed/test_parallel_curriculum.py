"""One recipe, one process or two: the same losses; a run whose rank dies ends soon, with a reason, and goes on."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from rank_launch import kill_rank_after_a_checkpoint, losses, train_command
from safetensors.torch import load_file

from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.parallel.settings import Parallel, can_spread_experts
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_file import save_recipe
from unimoe.trainers.recipe.recipe_mixers import MixersConfig
from unimoe.trainers.recipe.recipe_parts import ExpertConfig, LoraSettings, MoeConfig
from unimoe.trainers.stages.mixer_stage import MIXER_ROLES

pytestmark = pytest.mark.skipif(not can_spread_experts(), reason="this release of transformers cannot spread experts")

EXPERTS = [ExpertConfig("media", ["image", "speech"]), ExpertConfig("text", ["text"])]
SPREAD = {"data": 2, "expert": 2, "zero": 3}


def recipe(start: Path, out: Path, parallel: Parallel, steps: int = 3) -> Recipe:
    common: dict[str, Any] = {"batch_size": 8 // parallel.data, "learning_rate": 1e-3, "log_every": 1, "save_every": 2}
    common |= {"modalities": ["image", "text", "speech"]}
    lora = LoraSettings(rank=2, alpha=4, targets=["attention", "experts"])
    return Recipe(
        model=str(start / "model"),
        data=[str(start / "train.jsonl")],
        out=str(out),
        moe=MoeConfig(sparse_layers=[0, 2], num_experts=2, num_experts_per_tok=1),
        mixers=MixersConfig([0, 2], rank=8, num_heads=2, num_latents=3, compressor_depth=1, compressor_heads=2),
        parallel=parallel,
        stages=[
            StageConfig("experts", "experts", ["ffn", "connectors"], experts=EXPERTS, steps=2, **common),
            StageConfig("mixture", "moe", ["router", "connectors", *MIXER_ROLES], lora=lora, steps=steps, **common),
        ],
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_start(tmp_path_factory.mktemp("start"), 8)


def test_two_ranks_run_the_recipe_of_one(start: Path, tmp_path: Path) -> None:
    """Spread experts, killed in the middle of the last stage by the death of a rank, and started again."""
    spread = Parallel(**SPREAD)
    made = recipe(start, tmp_path / "two", spread, steps=20)
    save_recipe(made, tmp_path / "two.yaml")
    command = train_command(tmp_path / "two.yaml", spread)
    kill_rank_after_a_checkpoint(command, tmp_path / "two" / "mixture" / "checkpoints", tmp_path / "log")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run_curriculum(recipe(start, tmp_path / "one", Parallel(), steps=20), progress_bar=False)
    for stage in ("experts/media", "experts/text", "mixture"):
        found, expected = losses(tmp_path / "two" / stage), losses(tmp_path / "one" / stage)
        assert found[0] == pytest.approx(expected[0], rel=1e-5), stage
        # Connectors have dropout, which draws other numbers for batches that are cut otherwise.
        assert found == pytest.approx(expected, rel=1e-2), stage
    saved = load_file(tmp_path / "two" / "mixture" / "model" / "model.safetensors")
    assert [saved[name].shape[0] for name in saved if name.endswith(".mlp.experts.gate_up_proj")] == [2, 2]
    assert any(".mixer." in name for name in saved)
    config = json.loads((tmp_path / "two" / "mixture" / "model" / "config.json").read_text(encoding="utf-8"))
    assert "distributed_config" not in config


def test_a_launcher_that_starts_one_process_is_refused(start: Path, tmp_path: Path) -> None:
    from unimoe.errors import RecipeError

    with pytest.raises(RecipeError, match="1 process was started, but the recipe asks for 2"):
        run_curriculum(recipe(start, tmp_path, Parallel(data=2)), progress_bar=False)
    assert not torch.distributed.is_initialized()
