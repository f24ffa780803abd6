"""The examples of docs/training_data.md work, and its tables name what there is."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

import unimoe
from unimoe.trainers.planning.memory_plan import KINDS
from unimoe.trainers.recipe.recipe_data import DataEntry
from unimoe.trainers.recipe.recipe_file import load_recipe

FILE = Path(unimoe.__file__).parent / "docs" / "training_data.md"
PAGE = FILE.read_text(encoding="utf-8")
EXAMPLES = {kind: re.findall(rf"^```{kind}\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL) for kind in ("yaml", "python")}


def test_the_recipes_load(tmp_path: Path) -> None:
    fields = {"model": "start", "out": "out", "data": ["a.jsonl"], "stages": [{"name": "one"}]}
    assert len(EXAMPLES["yaml"]) == 2
    for text in EXAMPLES["yaml"]:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(fields | yaml.safe_load(text)), encoding="utf-8")
        load_recipe(file)


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"text": "A text."}) + "\n", encoding="utf-8")
    (code,) = EXAMPLES["python"]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["data"].groups == {"plain_text": [0], "text": [1]}  # type: ignore[attr-defined]
    assert names["data"].weights == [3, 1]  # type: ignore[attr-defined]


def test_the_tables_name_every_field_and_kind_of_memory() -> None:
    for field in dataclasses.fields(DataEntry):
        assert re.search(rf"`{field.name}`", PAGE), field.name
    rows = re.findall(r"^\| (\w+) \| ", PAGE.partition("### Memory")[2], re.MULTILINE)
    assert rows[1:7] == list(KINDS)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGE)
    assert links
    assert not [link for link in links if not (FILE.parent / link).exists()]
