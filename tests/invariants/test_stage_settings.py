"""A stage that was stopped goes on with the same settings and the same data, and with no others."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_training

from unimoe.errors import CheckpointError, RecipeError
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.data.data_sets import open_data
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_data import DataEntry
from unimoe.trainers.stages.stage import Progress
from unimoe.trainers.stages.stage_settings import identity_of


class StoppedError(Exception):
    pass


def stop_at_three(progress: Progress) -> None:
    if progress.step == 3:
        raise StoppedError


def write_texts(file: Path, texts: list[str]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    processor = tiny_training.processor()
    tiny_training.model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def stopped(model: Path, tmp_path: Path) -> Recipe:
    """Stopped behind step 3 of 5, of which two were saved."""
    stage = StageConfig("only", train=["head"], steps=5, batch_size=2, learning_rate=1e-3, log_every=1, save_every=2)
    data = write_texts(tmp_path / "train.jsonl", ["a", "b", "c"])
    made = Recipe(model=str(model), data=[data], out=str(tmp_path / "out"), stages=[stage])
    with pytest.raises(StoppedError):
        run_curriculum(made, on_progress=stop_at_three, progress_bar=False)
    return made


def go_on(made: Recipe, data: list[Any]) -> list[int]:
    """The steps that are made."""
    seen: list[int] = []
    made = dataclasses.replace(made, data=data)
    run_curriculum(made, on_progress=lambda progress: seen.append(progress.step), progress_bar=False)
    return seen


def test_a_stage_goes_on_with_its_own_data_only(stopped: Recipe, tmp_path: Path) -> None:
    other = write_texts(tmp_path / "texts.jsonl", ["a", "b", "d"])
    fewer = write_texts(tmp_path / "fewer.jsonl", ["a", "b"])
    turned = write_texts(tmp_path / "turned.jsonl", ["b", "a", "c"])
    for data in (other, fewer, turned):
        for _ in range(2):  # a refusal does not make the data the stage's own
            with pytest.raises(RecipeError, match=r"'only' in .* was started with other data.*same data, wherever"):
                go_on(stopped, [data])
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    assert go_on(stopped, [str(tmp_path / "moved.jsonl")])[-1] == 5


def test_what_an_older_release_started_goes_on(stopped: Recipe) -> None:
    file = Path(stopped.out) / "only" / "settings.json"
    settings = json.loads(file.read_text())
    del settings["samples"]
    file.write_text(json.dumps(settings))
    assert go_on(stopped, stopped.data)[-1] == 5
    assert json.loads(file.read_text())["samples"][0]["count"] == 3


@pytest.mark.parametrize("content", ["", '{"stage": {"na', "[]", "{}", '{"stage": 1}'])
def test_damaged_settings_are_told(content: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "only").mkdir(parents=True)
    (out / "only" / "settings.json").write_text(content)
    stage = StageConfig("only", train=["head"], steps=1, learning_rate=1e-3)
    data = write_texts(tmp_path / "train.jsonl", ["a"])
    with pytest.raises(CheckpointError, match=r"settings\.json is damaged .*delete .*only to run it again"):
        run_curriculum(Recipe(model=str(model), data=[data], out=str(out), stages=[stage]), progress_bar=False)


def test_streams_are_known_by_their_files(tmp_path: Path) -> None:
    paths = {
        "one": write_texts(tmp_path / "one" / "train.jsonl", ["a", "b"]),
        "moved": write_texts(tmp_path / "moved" / "train.jsonl", ["a", "b"]),
        "longer": write_texts(tmp_path / "longer" / "train.jsonl", ["a", "b", "c"]),
        "renamed": write_texts(tmp_path / "one" / "texts.jsonl", ["a", "b"]),
    }
    found = {
        name: identity_of(open_data([DataEntry(path, streaming=True, weight=1.0)])) for name, path in paths.items()
    }
    assert found["one"] == found["moved"] == [{"files": [["train.jsonl", Path(paths["one"]).stat().st_size]]}]
    assert found["one"] != found["longer"] != found["renamed"] != found["one"]


def test_data_in_memory_are_known_by_what_they_say(tmp_path: Path) -> None:
    tiny_training.write_jsonl(tmp_path / "here", per_modality=1)
    here = identity_of(ConversationDataset([tmp_path / "here" / "train.jsonl"]))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert identity_of(ConversationDataset([tmp_path / "there" / "train.jsonl"])) == here
    lines = (tmp_path / "there" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "there" / "train.jsonl").write_text("".join(lines[::-1]))
    assert identity_of(ConversationDataset([tmp_path / "there" / "train.jsonl"])) != here
