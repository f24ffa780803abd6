"""runs/unimoe_7b: the recipes say what the paper says, follow each other, and run on a tiny twin."""

import math
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import recipe_checks
import tiny_training
from recipe_checks import changed

from unimoe import cli
from unimoe.conversion.dense.sources import open_source
from unimoe.conversion.upcycling.assemble import plan_assembly, run_assembly
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.recipe.recipe import Recipe
from unimoe.trainers.recipe.recipe_file import load_recipe

FOLDER = Path(__file__).parents[2] / "runs" / "unimoe_7b"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Of the paper (arXiv 2405.11273): thousands of samples and epochs in Table 2, samples per step in section 4.4, for stage
# 3 in the authors' scripts.
SIZES = {
    "1_align_speech": (1700, 2, 32),
    "1_align_sound": (194, 2, 32),
    "2_expert_1": (150, 1, 16),
    "2_expert_2": (150, 1, 16),
    "2_expert_3": (150, 1, 16),
    "2_expert_4": (271, 1, 16),
    "2_expert_5": (271, 1, 16),
    "2_expert_6": (421, 1, 16),
    "2_expert_7": (209, 1, 16),
    "2_expert_8": (203, 1, 16),
    "3_mix_task1": (509, 3, 8),
    "3_mix_task2": (459, 2, 8),
    "3_mix_task3": (453, 2, 8),
    "3_mix_task4": (874, 2, 8),
    "3_mix_task4_eight": (874, 2, 64),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_values_are_the_authors(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    (stage,) = recipe.stages
    thousands, epochs, batch = SIZES[name]
    assert stage.batch_size * stage.gradient_accumulation_steps == batch
    assert stage.steps == math.ceil(thousands * 1000 * epochs / batch)
    assert stage.warmup_steps == math.ceil(0.03 * stage.steps)
    assert (stage.kind, stage.schedule, stage.weight_decay, stage.save_every) == ("train", "cosine", 0.0, 1000)
    assert Path(recipe.out).name == name
    if name.startswith("1"):
        assert (stage.learning_rate, stage.lora, stage.train) == (2e-5, None, ["connectors", "aligners"])
    elif name.startswith("2"):
        assert (stage.lora.rank, stage.lora.alpha, stage.lora.targets) == (64, 16, ["ffn"])
        assert stage.learning_rate == ({"ffn": 4e-4, "connectors": 3e-5} if name == "2_expert_8" else 4e-5)
        assert stage.train == ["connectors", *(["aligners"] if name == "2_expert_3" else [])]
    else:
        assert (stage.lora.rank, stage.lora.alpha, stage.learning_rate) == (8, 16, 4e-5)
        assert stage.lora.targets == ["attention", "experts", *(["ffn"] if name == "3_mix_task3" else [])]
        assert stage.train == ["router", "connectors"]
        assert stage.router_aux_loss_coef == (0.01 if name == "3_mix_task4_eight" else 0.0)
    assert recipe.precision == ("float32" if name == "3_mix_task3" else "bfloat16")


def test_there_is_a_recipe_for_every_task() -> None:
    assert set(SIZES) == set(RECIPES)


def test_every_value_names_its_source() -> None:
    for name in RECIPES:
        assert recipe_checks.lines_without_source(FOLDER / f"{name}.yaml") == []


@pytest.mark.parametrize("variant", ["speech", "sound", "eight"])
def test_the_script_runs_recipes_that_follow_each_other(variant: str, tmp_path: Path) -> None:
    fake, log = tmp_path / "unimoe", tmp_path / "log"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> "$LOG"\n', encoding="utf-8")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(log)}
    subprocess.run(["bash", FOLDER / "run.sh", variant], env=environment, check=True)
    made: set[Path] = set()
    experts = 0
    for command in log.read_text(encoding="utf-8").splitlines():
        args = cli.build_parser().parse_args(command.split())
        if "recipe" in args:
            recipe = load_recipe(FOLDER / args.recipe)
            assert Path(recipe.model) in made, command
            made.add(Path(recipe.out) / recipe.stages[0].name / "model")
        elif "language_model" in args:
            assert (args.speech_tower is None) == (args.beats is not None)
            made.add(FOLDER / args.out)
        else:
            assert {FOLDER / text.partition("=")[2] for text in args.expert} | {FOLDER / args.base} <= made
            made.add(FOLDER / args.out)
            experts = len(args.expert)
    assert experts == (8 if variant == "eight" else 4)


def test_the_script_explains_itself() -> None:
    done = subprocess.run(["bash", FOLDER / "run.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run.sh speech|sound|eight" in done.stdout


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a dense model with all towers, in which start-speech and start-sound are one."""
    return tiny_training.write_start(tmp_path_factory.mktemp("unimoe-7b"), 2, "dense")


def tiny_recipe(name: str, start: Path, out: Path, model: Path) -> Recipe:
    """A recipe with the sizes of the tiny twin; rates, roles and adapters stay."""
    (stage,) = load_recipe(FOLDER / f"{name}.yaml").stages
    sizes = {
        "model": model,
        "data": [str(start / "train.jsonl")],
        "media_root": "null",
        "out": out,
        f"{stage.name}.steps": 2,
        f"{stage.name}.warmup_steps": 0,
        f"{stage.name}.batch_size": 2,
        f"{stage.name}.gradient_accumulation_steps": 2,
        f"{stage.name}.log_every": 1,
    }
    if stage.lora is not None:
        sizes[f"{stage.name}.lora.rank"] = 2
    heard = "sound" if name in ("1_align_sound", "2_expert_8", "3_mix_task3") else "speech"
    sizes[f"{stage.name}.modalities"] = [heard] if stage.name == "align" else ["image", heard]
    return load_recipe(FOLDER / f"{name}.yaml", [f"{field}={value}" for field, value in sizes.items()])


def run(name: str, start: Path, out: Path, model: Path) -> tuple[Path, set[str]]:
    """The folder of the model after a recipe, and the roles of which something trained."""
    trained: set[str] = set()

    def look(_: str, rows: Any, steps: int) -> None:
        trained.update(row.role for row in rows if row.trainable)

    (report,) = run_curriculum(tiny_recipe(name, start, out, model), on_stage_start=look, progress_bar=False)
    assert report.steps == 2
    assert math.isfinite(report.loss_last)
    return Path(report.model), trained


def test_the_three_stages_run_on_a_tiny_twin(start: Path, tmp_path: Path) -> None:
    dense = start / "dense"
    aligned, trained = run("1_align_speech", start, tmp_path / "1", dense)
    assert trained == {"connectors", "aligners"}
    assert changed(dense, aligned) == {"connector"}
    experts = []
    for task in (2, 3, 7):
        tuned, trained = run(f"2_expert_{task}", start, tmp_path / f"2_{task}", aligned)
        assert trained == {"connectors", "ffn"} | ({"aligners"} if task == 3 else set())
        assert changed(aligned, tuned) == {"connector", "mlp."}
        experts.append((f"task{task}", tuned))
    plan = plan_assembly(open_source(str(experts[1][1])), [("llava", dense), *experts], sparse_layers=[0, 1, 2])
    run_assembly(plan, tmp_path / "sparse", progress=False)
    mixed, trained = run("3_mix_task2", start, tmp_path / "3", tmp_path / "sparse")
    assert trained == {"router", "connectors", "attention", "experts"}
    assert changed(tmp_path / "sparse", mixed) == {"connector", "self_attn", "mlp.gate.", "mlp.experts"}


@pytest.mark.parametrize(
    "name",
    [n for n in RECIPES if n not in ("1_align_speech", "2_expert_2", "2_expert_3", "2_expert_7", "3_mix_task2")],
)
def test_the_other_recipes_run_on_a_tiny_twin(name: str, start: Path, tmp_path: Path) -> None:
    model = start / "dense"
    if name.startswith("3"):
        count, layers = (8, [0, 1, 2]) if name == "3_mix_task4_eight" else (4, [0, 2])
        model = tmp_path / "sparse"
        plan = plan_assembly(
            open_source(str(start / "dense")), [("same", start / "dense")] * count, sparse_layers=layers
        )
        run_assembly(plan, model, progress=False)
    run(name, start, tmp_path / "out", model)
