"""Data sets of every kind give the same samples; what cannot be read is refused by name."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import tiny_media
import tiny_training

from unimoe import hub_access
from unimoe.errors import DataError, RecipeError
from unimoe.trainers.data import hub_data
from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.data.data_sets import open_data
from unimoe.trainers.data.data_sources import Source
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_data import DataEntry, settings_of
from unimoe.trainers.recipe.recipe_file import load_recipe, save_recipe

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")


def record(index: int) -> dict[str, Any]:
    """Its messages are lists of items, as tables need them."""
    asked = [{"type": "image", "path": "a.png"}, {"type": "text", "text": f"What is {index}?"}]
    answer = [{"type": "text", "text": "Red."}]
    return {
        "id": str(index),
        "split": "train" if index % 3 else "heldout",
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
    }


RECORDS = [record(index) for index in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same records in every form; `many` has them in two files."""
    root = tmp_path_factory.mktemp("sets")
    lines = [json.dumps(one) + "\n" for one in RECORDS]
    (root / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    (root / "a.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    (root / "many").mkdir()
    (root / "many" / "1.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    table = datasets.Dataset.from_list(RECORDS)
    table.select(range(5, 10)).to_parquet(root / "many" / "2.parquet")
    table.to_parquet(root / "a.parquet")
    table.save_to_disk(str(root / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(root / "splits"))
    for place in (root, root / "many", root / "saved", root / "splits"):
        (place / "a.png").write_bytes(tiny_media.encoded_picture(seed=1))
    return root


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "many", "saved", "splits"])
def test_every_form_gives_the_same_samples(folder: Path, name: str) -> None:
    data = open_data([str(folder / name)], media_root=folder)
    expected = open_data([str(folder / "a.jsonl")])
    assert data.samples == expected.samples  # type: ignore[union-attr]
    entry = DataEntry(str(folder / name), streaming=True, shuffle_buffer=1)
    assert list(Source(entry, folder).samples()) == expected.samples  # type: ignore[union-attr]
    assert len(list(Source(DataEntry(str(folder / name), max_samples=7), folder).samples())) == 7


def test_paths_start_from_the_data_set(folder: Path) -> None:
    for name, place in {"a.parquet": "a.png", "many": "many/a.png", "saved": "saved/a.png"}.items():
        sample = open_data([str(folder / name)])[0]
        assert Path(sample["messages"][0]["content"][0]["path"]) == folder / place
    assert len(open_data([str(folder / "splits")])) == 10  # type: ignore[arg-type]
    other = DataEntry(str(folder / "a.jsonl"), media_root=str(folder / "saved"))
    assert open_data([other])[0]["messages"][0]["content"][0]["path"] == str(folder / "saved" / "a.png")


def test_splits_of_files_and_of_data_sets(folder: Path) -> None:
    def ids(name: str, split: str) -> list[str]:
        return [s["id"] for s in Source(DataEntry(str(folder / name), split=split)).samples()]

    assert ids("a.jsonl", "heldout") == ids("a.parquet", "heldout") == ["0", "3", "6", "9"]
    assert ids("splits", "test") == ["0"]
    with pytest.raises(DataError, match=r"has no split 'dev': set split to one of train, test"):
        Source(DataEntry(str(folder / "splits"), split="dev"))
    with pytest.raises(DataError, match="has no splits, but split is 'dev'"):
        Source(DataEntry(str(folder / "saved"), split="dev"))
    with pytest.raises(DataError, match=r"not a single sample in .*a\.jsonl of the split 'dev'"):
        open_data([DataEntry(str(folder / "a.jsonl"), split="dev")])


def test_headers_tell_the_number_of_records(folder: Path) -> None:
    counts = {
        name: Source(DataEntry(str(folder / name))).count for name in ("a.parquet", "saved", "splits", "a.jsonl")
    }
    assert counts == {"a.parquet": 10, "saved": 10, "splits": 10, "a.jsonl": None}
    assert Source(DataEntry(str(folder / "saved"), max_samples=4)).count == 4


def test_columns_make_conversations(tmp_path: Path) -> None:
    pictures = [PIL.Image.new("RGB", (20, 24), colour) for colour in ("red", "blue")]
    table = datasets.Dataset.from_dict(
        {"img": [*pictures, None], "q": ["What?", "Which?", "Say it."], "a": ["red", "blue", "it"], "n": [1, 2, 3]}
    )
    entry = DataEntry(columns={"image": "img", "question": "q", "answer": "a"})
    data = open_data([Source(entry, rows=table)])
    assert [s["modality"] for s in data.samples] == ["image", "image", "text"]  # type: ignore[union-attr]
    assert data[1]["messages"][1]["content"] == [{"type": "text", "text": "blue"}]
    batch = RawCollator(tiny_training.processor())(data.samples)  # type: ignore[union-attr]
    assert batch["pixel_values"].shape[0] == 2
    assert batch["group"] == "mixed"
    streamed = Source(entry, rows=table.to_iterable_dataset())
    assert [s["messages"] for s in streamed.samples()] == [s["messages"] for s in data.samples]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"row 1 has no column 'why'; it has img, q, a, n"):
        open_data([Source(DataEntry(columns={"question": "why", "answer": "a"}), rows=table)])
    with pytest.raises(DataError, match=r"row 1: 'n' \(answer\) is 1; it must be text"):
        open_data([Source(DataEntry(columns={"question": "q", "answer": "n"}), rows=table)])
    plain = Source(DataEntry(columns={"text": "q", "id": "n"}), rows=table)
    assert [s["text"] for s in plain.samples()] == ["What?", "Which?", "Say it."]


def test_what_cannot_be_read_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-20])
    cases = {
        tmp_path / "nothing.jsonl": "nothing.jsonl are not there",
        tmp_path / "empty": "has no data in it",
        next((folder / "saved").glob("*.arrow")): "give its folder",
        tmp_path / "cut.parquet": "cut.parquet cannot be read",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_data([str(path)])


# --- the Hub


def test_only_what_is_named_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "A text."}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub_data, "why_silent", lambda endpoint, name: asked.append(name) or "")
    entry = DataEntry(hub="owner/name", subset="small", split="test", revision="abc", streaming=True)
    assert [s["text"] for s in Source(entry).samples()] == ["A text."]
    options = {"split": "test", "revision": "abc", "streaming": True}
    assert asked == ["datasets/owner/name", (("owner/name", "small"), options)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Source(DataEntry(hub="owner/name"))
    assert len(asked) == 3  # offline, only the library's own cache


def test_a_silent_hub_and_unknown_data_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_data, "why_silent", lambda endpoint, name: "no answer")
    with pytest.raises(DataError, match=r"owner/name cannot be had from the Hub \(.*no answer\)"):
        Source(DataEntry(hub="owner/name"))

    def load(*args: Any, **kwargs: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist.")

    monkeypatch.setattr(hub_data, "why_silent", lambda endpoint, name: "")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="doesn't exist"):
        Source(DataEntry(hub="owner/name"))
    assert hub_access.why_silent is not hub_data.why_silent  # the test's own stood in


# --- in recipes


def recipe(*data: str | DataEntry, **fields: Any) -> Recipe:
    stages = fields.pop("stages", [StageConfig("one")])
    return Recipe(model="start", data=list(data), out="out", stages=stages, **fields)


STREAM = DataEntry("b.jsonl", streaming=True)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (recipe(DataEntry()), r"data\[0\] has path = None and hub = None: give exactly one"),
        (recipe(DataEntry("a", hub="b/c")), r"give exactly one"),
        (recipe(DataEntry(hub="https://x/y/z")), r"data\[0\]\.hub is 'https"),
        (recipe(DataEntry("a", subset="s")), r"data\[0\]\.subset is 's'"),
        (recipe(DataEntry("a", weight=0.0)), r"data\[0\]\.weight is 0\.0; it must be a positive number"),
        (recipe(DataEntry("a", weight=float("nan"))), r"weight is nan"),
        (recipe("a", DataEntry("b", weight=2.0)), r"data\[0\] \(a\) has no weight, but others have"),
        (recipe("a", STREAM), r"data\[1\] \(b\.jsonl\) is streamed beside other data.*give every entry a weight"),
        (recipe(DataEntry("a", max_samples=0)), r"max_samples is 0"),
        (recipe(DataEntry("a", shuffle_buffer=0)), r"shuffle_buffer is 0"),
        (
            recipe(DataEntry("a", columns={"question": "q"})),
            r"columns is .*exactly one of these: .*question with answer",
        ),
        (recipe(DataEntry("a", columns={"smell": "q"})), r"columns is 'smell'"),
        (recipe(DataEntry("a", columns={"text": "t", "image": "i"})), r"names \['image'\], which go with question"),
        (recipe(STREAM, cache="c"), r"the cache needs all media beforehand"),
        (
            recipe(STREAM, stages=[StageConfig("one", modality_weights={"text": 1})]),
            r"modality_weights cannot be kept",
        ),
        (recipe(DataEntry("a", media_root="/x"), media_root="/y"), r"media_root of a is '/x'; it must be inside"),
        (recipe("a", stages=[StageConfig("one", packing=True)]), r"packing is true, but there is no max_length"),
        (recipe("a", stages=[StageConfig("one", cut_long_texts=True)]), r"cut_long_texts is true, but"),
        (recipe("a", stages=[StageConfig("one", max_length=1)]), r"max_length is 1"),
        (
            recipe("a", stages=[StageConfig("one", batches="mixed", packing=True, max_length=9)]),
            r"has packing, which needs batches of one modality",
        ),
        (recipe("a", stages=[StageConfig("one", data=[DataEntry("b", weight=-1.0)])]), r"data\[0\]\.weight is -1"),
    ],
)
def test_impossible_entries_are_refused_before_anything_is_read(made: Recipe, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made.check()


def test_entries_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: start\nout: out\n"
        "data: [{path: a.jsonl, weight: 1}, {path: sub, weight: 2e0, streaming: true, media_root: media}]\n"
        "stages: [{name: one, data: [b.jsonl, {hub: owner/name}]}]\n",
        encoding="utf-8",
    )
    made = load_recipe(file)
    assert made.data == [
        DataEntry(str(tmp_path / "a.jsonl"), weight=1.0),
        DataEntry(str(tmp_path / "sub"), weight=2.0, streaming=True, media_root=str(tmp_path / "media")),
    ]
    assert made.stages[0].data == [str(tmp_path / "b.jsonl"), DataEntry(hub="owner/name")]
    (tmp_path / "elsewhere").mkdir()
    save_recipe(made, tmp_path / "elsewhere" / "again.yaml")
    assert load_recipe(tmp_path / "elsewhere" / "again.yaml") == made
    file.write_text(file.read_text().replace("streaming", "steaming"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"data\[1\]\.steaming .*Did you mean 'streaming'"):
        load_recipe(file)


def test_moving_data_changes_nothing_and_weighing_it_does() -> None:
    assert settings_of(["a.jsonl", DataEntry("b.jsonl")]) is None
    one, moved = DataEntry("a", weight=2.0), DataEntry("b", weight=2.0, media_root="m")
    assert settings_of([one]) == settings_of([moved]) != settings_of([DataEntry("a", weight=3.0)])
