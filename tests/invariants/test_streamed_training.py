"""A run on streamed, weighted, packed data: killed and resumed it is bit-equal to one that was never stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch

from unimoe import UniMoeForCausalLM
from unimoe.errors import DataError, RecipeError
from unimoe.trainers.caches.encoder_cache import EncoderCache
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.data.bad_samples import FILE
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_data import DataEntry
from unimoe.trainers.recipe.recipe_parts import ExpertConfig, MoeConfig
from unimoe.trainers.stages.stage import Progress


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a file of everything and one of texts, of which one is too long and one is broken."""
    folder = tmp_path_factory.mktemp("start")
    processor = tiny_training.processor()
    everything = tiny_training.write_jsonl(folder, per_modality=6)
    long = tiny_training.sample("text", 99, None, "Say red." * 60, "red")
    texts = [line for line in everything.read_text().splitlines() if '"task": "text"' in line]
    texts = [*texts, json.dumps(long), '{"id": "cut", "messages": [', json.dumps({"text": "red blue green white"})]
    (folder / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    tiny_training.model(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def recipe(start: Path, out: Path, **stage: Any) -> Recipe:
    fields: dict[str, Any] = {"steps": 6, "batch_size": 2, "save_every": 2, "log_every": 1, "learning_rate": 1e-3}
    fields |= {"train": ["ffn", "connectors"], "gradient_accumulation_steps": 2, "max_length": 128, "packing": True}
    return Recipe(
        model=str(start / "model"),
        data=[
            DataEntry(str(start / "train.jsonl"), weight=1, streaming=True, shuffle_buffer=4),
            DataEntry(str(start / "texts.jsonl"), weight=2, streaming=True, shuffle_buffer=3),
        ],
        out=str(out),
        stages=[StageConfig("one", **(fields | stage))],
        max_bad_samples=0.5,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return UniMoeForCausalLM.from_pretrained(folder / "one" / "model").state_dict()


def test_a_killed_run_goes_on_where_it_was(start: Path, tmp_path: Path) -> None:
    run_curriculum(recipe(start, tmp_path / "whole"), progress_bar=False)

    def kill(progress: Progress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    again = recipe(start, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run_curriculum(again, on_progress=kill, progress_bar=False)
    assert (tmp_path / "parts" / "one" / "checkpoints" / "checkpoint-4").is_dir()
    run_curriculum(again, progress_bar=False)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    logs = [(tmp_path / name / "one" / "losses.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    logs = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs]
    assert logs[0] == logs[1]
    assert {group for record in logs[0] for group in record["groups"]} >= {"text", "image"}
    bad = [json.loads(line) for line in (tmp_path / "whole" / "one" / FILE).read_text().splitlines()]
    reasons = {record["id"].rpartition("/")[2]: record["reason"] for record in bad}
    assert "more than max_length = 128; cut_long_texts would cut it" in reasons["text-99"]
    assert "is not JSON" in reasons["texts.jsonl:8"]


def test_other_shares_are_other_settings(start: Path, tmp_path: Path) -> None:
    made = recipe(start, tmp_path, steps=1, packing=False)
    run_curriculum(made, progress_bar=False)
    made.data[1].weight = 3.0  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match=r"was started with data = .*delete that folder"):
        run_curriculum(made, progress_bar=False)


def test_streams_are_refused_where_all_samples_are_needed(start: Path, tmp_path: Path) -> None:
    made = recipe(start, tmp_path / "a")
    model = tiny_training.model(tiny_training.processor())
    cache = EncoderCache(tmp_path / "cache", model, tiny_training.processor())
    with pytest.raises(RecipeError, match="The cache needs all samples beforehand"):
        run_curriculum(made, cache=cache, progress_bar=False)
    experts = recipe(start, tmp_path / "b", kind="experts", experts=[ExpertConfig("text", ["text"])], train=["ffn"])
    experts.moe = MoeConfig()
    with pytest.raises(RecipeError, match="is of kind 'experts', which needs its data in memory"):
        run_curriculum(experts, progress_bar=False)


def test_media_are_left_out_whole_and_texts_cut_only_when_told(start: Path) -> None:
    from unimoe.trainers.data.collator import RawCollator, RowRules
    from unimoe.trainers.data.conversations import ConversationDataset

    processor = tiny_training.processor()
    data = ConversationDataset([start / "train.jsonl"])
    image, text = data.select(["image"])[0], data.select(["text"])[0]
    for cut in (False, True):
        with pytest.raises(
            DataError, match=r"image-0: it has \d+ tokens, more than max_length = 20, and a medium is never"
        ):
            RawCollator(processor, rules=RowRules(20, cut))([image])
    whole = RawCollator(processor, 1)([text])
    length = whole["input_ids"].shape[1]
    with pytest.raises(DataError, match=r"text-0: .*cut_long_texts would cut it"):
        RawCollator(processor, rules=RowRules(length - 1))([text])
    cut_row = RawCollator(processor, 1, RowRules(length - 1, cut_long_texts=True))([text])
    for name in ("input_ids", "labels"):
        assert torch.equal(cut_row[name], whole[name][:, :-1])
    with pytest.raises(DataError, match=r"text-0: .*what is learned lies beyond"):
        RawCollator(processor, rules=RowRules(8, cut_long_texts=True))([text])
