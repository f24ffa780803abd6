"""A recipe whose experts do not fit its model is refused before anything is trained or written."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from unimoe import UniMoeConfig
from unimoe.cli import main
from unimoe.errors import RecipeError
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_parts import ExpertConfig, MoeConfig

STAGES = [StageConfig("projector"), StageConfig("sparse", "moe", ["router", "experts"])]
THREE = [ExpertConfig(name, [name]) for name in ("image", "speech", "text")]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a layer too far": ({"sparse_layers": [1, 3]}, r"moe.sparse_layers is \[1, 3\]; this model has layers 0 to 2"),
    "a layer twice": ({"sparse_layers": [1, 1]}, "each may stand once"),
    "groups of other experts": ({"expert_groups": {"all": [0, 1, 2, 4]}}, r"expert_groups\['all'\] is \[0, 1, 2, 4\]"),
    "experts in no group": (
        {"expert_groups": {"all": [0, 1]}, "modality_groups": dict.fromkeys(("text", "image", "video", "speech", "sound"), "all")},
        r"names no group for experts \[2, 3\]",
    ),
    "modalities without group": ({"expert_groups": {"seen": [0, 1], "said": [2, 3]}}, "modality_groups sends 'text'"),
    "more per token than a group has": (
        {"num_experts_per_tok": 4, **tiny.MOIIE_GROUPS},
        "num_experts_per_tok is 4; it must be between 1 and 3",
    ),
    "routing that does not go together": (
        {"routing": {"router_type": "dynamic", "router_scoring": "sigmoid"}},
        "router_scoring is 'sigmoid', which is not combined",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model's configuration; nothing more may be needed to see that a recipe cannot work."""
    folder = tmp_path_factory.mktemp("start")
    dense = UniMoeConfig(text_config=tiny.text_config(num_experts=0, sparse_layers=None))
    dense.save_pretrained(folder)
    return folder


def refuse(made: Recipe, message: str) -> None:
    anything: Any = object()  # neither data nor processor are looked at
    with pytest.raises(RecipeError, match=message):
        run_curriculum(made, processor=anything, dataset=anything)


def recipe(model: Path, moe: dict[str, Any], stages: list[StageConfig] = STAGES) -> Recipe:
    fields = {"num_experts": 4, "router_init": "normal", **moe}
    return Recipe(str(model), ["none.jsonl"], str(model / "out"), stages, moe=MoeConfig(**fields))


@pytest.mark.parametrize("name", WRONG)
def test_experts_that_do_not_fit_are_refused_at_the_start(name: str, start: Path) -> None:
    moe, message = WRONG[name]
    refuse(recipe(start, moe), message)
    assert not (start / "out").exists()


def test_the_number_of_trained_experts_counts(start: Path) -> None:
    stages = [StageConfig("experts", "experts", ["ffn"], experts=THREE), STAGES[1]]
    groups = {"num_experts": None, **tiny.MOIIE_GROUPS}
    refuse(recipe(start, groups, stages), "must list different experts between 0 and 2")


def test_a_sparse_model_cannot_become_sparse(tmp_path: Path) -> None:
    UniMoeConfig(text_config=tiny.text_config()).save_pretrained(tmp_path)
    refuse(recipe(tmp_path, {"sparse_layers": [1]}), "already has 4 experts in layers")


def test_the_printed_plan_is_refused_too(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {
        "model": str(start),
        "data": ["none.jsonl"],
        "out": "out",
        "moe": {"num_experts": 4, "router_init": "zeros", "sparse_layers": [7]},
        "stages": [{"name": "sparse", "kind": "moe", "train": ["router"]}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(text))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--plan"]) == 2
    assert "moe.sparse_layers is [7]; this model has layers 0 to 2" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "recipe.yaml"), "--plan", "--set", "moe.sparse_layers=[1]"]) == 0
