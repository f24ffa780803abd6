"""Recipes: YAML and dataclasses say the same, and what is impossible is refused with field, value and remedy."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import unimoe
from unimoe.cli import main
from unimoe.errors import RecipeError
from unimoe.trainers.planning.plan import plan_curriculum
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_file import load_recipe, save_recipe
from unimoe.trainers.recipe.recipe_parts import ExpertConfig, LoraSettings, MoeConfig

EXAMPLE = Path(unimoe.__file__).parent / "trainers" / "recipes" / "unimoe_three_stages.yaml"


def fields(**overrides: Any) -> dict[str, Any]:
    base = {"model": "start", "data": ["a.jsonl"], "out": "out", "stages": [{"name": "one"}]}
    return {**base, **overrides}


def written(folder: Path, data: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def test_a_recipe_survives_being_saved(tmp_path: Path) -> None:
    recipe = Recipe(
        model=str(tmp_path / "m"),
        data=[str(tmp_path / "d.jsonl")],
        out=str(tmp_path / "out"),
        seed=3,
        moe=MoeConfig(sparse_layers=[1, 3], router_init="zeros"),
        stages=[
            StageConfig("a", learning_rate={"connectors": 1e-3}, feature_noise={"image": 0.2}),
            StageConfig("b", kind="experts", train=["ffn"], experts=[ExpertConfig("x", ["image"], steps=5)]),
            StageConfig("c", kind="moe", train=["router"], lora=LoraSettings(rank=4), adam_betas=[0.9, 0.98]),
        ],
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_the_example_recipe_loads() -> None:
    recipe = load_recipe(EXAMPLE)
    assert [stage.kind for stage in recipe.stages] == ["train", "experts", "moe"]
    assert recipe.stages[2].lora == LoraSettings(rank=8, alpha=16.0)
    recipe.stages[1].time_limit_seconds = 10.0
    plan = plan_curriculum(recipe)
    assert [(row.steps, row.seconds) for row in plan] == [(1000, None), (1300, 40.0), (2000, None)]


def test_the_example_recipe_explains_every_field_with_its_default() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    classes = (Recipe, MoeConfig, StageConfig, LoraSettings, ExpertConfig)
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert re.search(rf"(?<!\w){field.name}:", text), f"{cls.__name__}.{field.name}"
    commented = re.findall(r"^\s*# (\w+): (.+?) +# \S", text, re.MULTILINE)
    assert len(commented) > 10
    for name, value in commented:
        owners = [field for cls in classes for field in dataclasses.fields(cls) if field.name == name]
        made = [field for field in owners if field.default_factory is not dataclasses.MISSING]
        defaults = [field.default_factory() if field in made else field.default for field in owners]
        assert yaml.safe_load(value) in defaults, name


def test_paths_start_from_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, fields()))
    assert recipe.model == str(tmp_path / "start")
    assert recipe.data == [str(tmp_path / "a.jsonl")]


def test_overrides_reach_stages_and_nested_fields(tmp_path: Path) -> None:
    file = written(tmp_path, fields(moe={"sparse_layers": [0]}))
    recipe = load_recipe(file, ["seed=7", "one.steps=12", "one.learning_rate=1e-3", "moe.num_experts=4"])
    assert (recipe.seed, recipe.stages[0].steps, recipe.moe.num_experts) == (7, 12, 4)
    assert recipe.stages[0].learning_rate == 1e-3
    with pytest.raises(RecipeError, match=r"no '='"):
        load_recipe(file, ["seed"])
    with pytest.raises(RecipeError, match=r"goes through 'seed'"):
        load_recipe(file, ["seed=1", "seed.x=1"])


def stage(**overrides: Any) -> dict[str, Any]:
    return fields(stages=[{"name": "one", **overrides}])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (fields(modle="x"), r"modle is 'x'.*Did you mean 'model'"),
        ({"model": "x"}, r"data is missing.*a list of text"),
        (fields(stages=[]), r"stages is \[\]"),
        (fields(seed="x"), r"seed is 'x'; it must be an integer"),
        (fields(seed=True), r"seed is True"),
        (fields(precision="fp8"), r"precision is 'fp8'; it must be one of 'float32', 'bfloat16'"),
        (fields(stages=[{"name": "a"}, {"name": "a"}]), r"stages is \['a'\]; it must be different names"),
        (fields(stages=[{"name": "../a"}]), r"name is '../a'"),
        (stage(steps=0), r"stages\[0\] \(one\)\.steps is 0; it must be between 1"),
        (stage(stepz=1), r"stages\[0\]\.stepz is 1.*'steps'"),
        (stage(kind="tune"), r"stages\[0\]\.kind is 'tune'; it must be one of 'train', 'experts', 'moe'"),
        (stage(train=["layers"]), r"train is 'layers'; it must be one of 'towers'"),
        (stage(train=[]), r"train is \[\]"),
        (stage(learning_rate=-1.0), r"learning_rate is -1.0"),
        (stage(learning_rate=float("nan")), r"learning_rate is nan"),
        (stage(learning_rate={"head": 1e-3}), r"missing: \['connectors'\], not trained: \['head'\]"),
        (stage(token_dropout={"image": 1.0}), r"token_dropout.image is 1.0"),
        (stage(adam_betas=[0.9]), r"adam_betas is \[0.9\]"),
        (stage(lora={"rank": 0}), r"lora.rank is 0"),
        (stage(lora={"dropout": 0.1}), r"lora.dropout is 0.1; it must be 0"),
        (stage(train=["attention"], lora={"targets": ["attention"]}), r"both fully and through LoRA"),
        (stage(time_limit_seconds=0), r"time_limit_seconds is 0"),
        (stage(experts=[{"name": "a", "modalities": ["image"]}]), r"of kind 'train' with 1 experts"),
        (stage(kind="experts", train=["ffn"]), r"of kind 'experts' with 0 experts"),
        (stage(kind="moe", train=["router"]), r"no moe section"),
        (fields(moe={}, stages=[{"name": "one", "kind": "moe"}]), r"no stage of kind 'experts' before it"),
        (fields(moe={"router_init": "ones"}), r"router_init is 'ones'"),
        (fields(moe={"num_experts": 1, "num_experts_per_tok": 2}), r"num_experts_per_tok is 2"),
        (
            fields(moe={"routing": {"num_layers": 3}}),
            r"moe.routing names \['num_layers'\]; it may set capacity_policy",
        ),
        (fields(moe={"routing": {"router_type": "dynamc"}}), r"moe.routing: .*router_type.*dynamc"),
        (fields(moe={"routing": {"num_shared_experts": "two"}}), r"moe.routing: .*num_shared_experts.*two"),
        (fields(cache="c", stages=[{"name": "one", "train": ["towers"]}]), r"one.* trains the towers"),
        ([1, 2], r"a YAML mapping"),
        (fields(out=5), r"^out is 5; it must be text"),
        (fields(out=""), r"^out is ''; it must be a path"),
        (fields(model="a\0b"), r"^model is 'a\\x00b'; it must be a path"),
        (fields(model="~no-such-person/model"), r"^model is '~no-such-person/model'.*home folder"),
        (fields(data="a.jsonl"), r"^data is 'a.jsonl'; it must be a list of text"),
        (fields(data=[]), r"^data is \[\]; it must be a list with at least one file"),
        (stage(data=[]), r"data is \[\]; it must be a list with at least one file"),
        (stage(data=["a\0b"]), r"^stages\[0\]\.data\[0\] is 'a\\x00b'; it must be a path"),
        (stage(train="router"), r"stages\[0\]\.train is 'router'; it must be a list of text"),
        (stage(max_grad_norm=float("inf")), r"max_grad_norm is inf; it must be finite"),
        (stage(name="a\n"), r"name is 'a\\n'; it must be a name that can be a folder"),
        (stage(name="a" * 300), r"name is 'aaa.*at most 60 characters"),
    ],
)
def test_impossible_recipes_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, data))


def test_the_number_of_experts_must_agree(tmp_path: Path) -> None:
    experts = [{"name": name, "modalities": [name]} for name in ("image", "text")]
    stages = [
        {"name": "two", "kind": "experts", "train": ["ffn"], "experts": experts},
        {"name": "three", "kind": "moe", "train": ["router"]},
    ]
    load_recipe(written(tmp_path, fields(stages=stages, moe={"num_experts": 2})))
    with pytest.raises(RecipeError, match=r"num_experts is 3 but 2 experts are trained"):
        load_recipe(written(tmp_path, fields(stages=stages, moe={"num_experts": 3})))


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml cannot be read"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bad\.yaml is not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfemodel: x", r"recipe\.yaml is not UTF-8 text \(byte 0 is 0xff\)"),
        (b"model: 2020-13-45", r"recipe\.yaml is not valid YAML: month must be"),
        (b"[" * 5000, r"recipe\.yaml is not valid YAML"),
    ],
    ids=["no text", "no date", "no end"],
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("override", ["seed=[", "seed=2020-13-45", "seed=!!python/x 1"])
def test_overrides_that_are_no_yaml_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"The value of the override 'seed=.*is not valid YAML"):
        load_recipe(written(tmp_path, fields()), [override])


@pytest.mark.parametrize("stages", [5, None, [{"name": ["a"]}]], ids=["number", "nothing", "list for name"])
def test_overrides_of_a_broken_recipe_blame_the_recipe(tmp_path: Path, stages: Any) -> None:
    with pytest.raises(RecipeError, match=r"^stages"):
        load_recipe(written(tmp_path, fields(stages=stages)), ["seed=1"])


def test_a_model_that_is_not_there_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["train", str(recipe)]) == 2
    message = capsys.readouterr().err.strip()
    assert str(tmp_path / "start_model") in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert len(message.splitlines()) == 1


def test_data_that_are_not_there_are_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "start_model").mkdir()
    (tmp_path / "start_model" / "config.json").write_text("{}")
    assert main(["train", str(recipe)]) == 2
    shown = capsys.readouterr()
    assert f"{tmp_path / 'train.jsonl'} are not there" in shown.err
    assert f"not there yet: {tmp_path / 'train.jsonl'}\n" in shown.out
    assert not (tmp_path / "training").exists()


def test_a_saved_recipe_means_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    recipe = Recipe(
        model="start", data=["data.jsonl"], out="result", stages=[StageConfig(name="a", train=["ffn"], steps=1)]
    )
    save_recipe(recipe, tmp_path / "inner" / "recipe.yaml")
    again = load_recipe(tmp_path / "inner" / "recipe.yaml")
    assert (again.model, again.out, again.data) == (
        str(tmp_path / "start"),
        str(tmp_path / "result"),
        [str(tmp_path / "data.jsonl")],
    )


def test_the_command_prints_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "mixture.steps=5", "--set", "connectors.gradient_accumulation_steps=4"]
    assert main(["train", str(EXAMPLE), "--plan", *options]) == 0
    printed = capsys.readouterr().out
    assert "one expert each for image, speech, sound, video_text" in printed
    assert "mixture: assembles the experts, then trains router, connectors and LoRA (rank 8)" in printed
    assert "5 steps of 32 samples" in printed
    assert "steps of 128 samples" in printed
    assert "not there yet: " in printed
