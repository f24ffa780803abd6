"""Samples from files, and batches of one modality each."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from unimoe.errors import DataError, RecipeError
from unimoe.trainers.data.conversations import ConversationDataset, Draw, group_of
from unimoe.trainers.data.sampler import ModalityBatchSampler, group_weights


def conversation(modality: str | None = None, task: str | None = None, **item: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [item] if item else []
    sample = {
        "messages": [
            {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "This."},
        ]
    }
    return sample | {k: v for k, v in (("modality", modality), ("task", task)) if v}


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return file


def test_paths_start_from_the_file_or_the_media_root(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    file = written(tmp_path, conversation(type="image", path="a.png"))
    for root in (None, tmp_path):
        sample = ConversationDataset([file], media_root=root)[0]
        assert sample["messages"][0]["content"][0]["path"] == str(tmp_path / "a.png")
    assert (sample["modality"], sample["task"], sample["id"]) == ("image", "image", f"{file}:1")
    with pytest.raises(DataError, match=r"1 media files are missing: .*elsewhere/a\.png"):
        ConversationDataset([file], media_root=tmp_path / "elsewhere")


def test_missing_media_are_counted_and_the_first_named(tmp_path: Path) -> None:
    lines = [conversation(type="image", path=f"{i}.png") for i in range(8)]
    with pytest.raises(DataError, match=r"8 media files are missing: .*0\.png.*4\.png.* and 3 more"):
        ConversationDataset([written(tmp_path, *lines)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"data\.jsonl:2 is not JSON"),
        ([1], r"data\.jsonl:2 must be a mapping"),
        ({"id": "x"}, r"data\.jsonl:2 must be a mapping with either"),
        ({"text": ""}, r"data\.jsonl:2: 'text' is ''"),
        ({"messages": []}, r"data\.jsonl:2: \[\] must be a list"),
        ({"messages": [{"role": "user"}]}, r"data\.jsonl:2: the message"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"data\.jsonl:2 has no message of the assistant"),
        (conversation(type="image"), r"data\.jsonl:2: the image item has neither"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ConversationDataset([written(tmp_path, {"text": "fine"}, line)])


def test_unreadable_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl cannot be read"):
        ConversationDataset([tmp_path / "nothing.jsonl"])
    with pytest.raises(DataError, match="not a single sample"):
        ConversationDataset([written(tmp_path, "")])


def mixed() -> ConversationDataset:
    samples = [{"text": "plain"}] * 3
    samples += [conversation("video", task) for task in ["video_direction"] * 2 + ["video_object"] * 4]
    samples += [conversation("text", "image")] * 5 + [conversation("image")] * 6
    return ConversationDataset.from_samples(samples)


def test_groups_and_selection() -> None:
    dataset = mixed()
    sizes = {name: len(indices) for name, indices in dataset.groups.items()}
    # "image" questions asked in text do not share a batch with images.
    assert sizes == {"plain_text": 3, "video_direction": 2, "video_object": 4, "text/image": 5, "image": 6}
    assert len(dataset.select(["video"])) == 6
    assert len(dataset.select(["video_object", "plain_text"])) == 7
    assert len(dataset.select([])) == len(dataset)
    with pytest.raises(DataError, match=r"\['smell'\]; the data have"):
        dataset.select(["smell"])
    assert dataset[Draw(0, seed=5)]["draw_seed"] == 5
    assert "draw_seed" not in dataset[0]


def test_weights_by_modality_are_split_among_its_tasks() -> None:
    dataset = mixed().select(["video", "plain_text"])
    weights = group_weights(dataset, {"video": 3.0, "plain_text": 1.0})
    assert weights == {"video_direction": 1.0, "video_object": 2.0, "plain_text": 1.0}
    assert group_weights(dataset, {"video": 1, "video_object": 5, "text": 1})["video_direction"] == 1.0
    assert group_weights(dataset, {}) is None
    with pytest.raises(RecipeError, match=r"leaves out \['plain_text'\]"):
        group_weights(dataset, {"video": 1.0})
    with pytest.raises(RecipeError, match=r"names \['image'\]"):
        group_weights(dataset, {"video": 1.0, "text": 1.0, "image": 1.0})
    with pytest.raises(RecipeError, match="above 0"):
        group_weights(dataset, {"video": 0.0, "text": 0.0})


def test_batches_hold_one_group_and_follow_the_weights() -> None:
    dataset = mixed()
    weights = {"plain_text": 1.0, "video_direction": 0.0, "video_object": 2.0, "text/image": 1.0, "image": 4.0}
    sampler = ModalityBatchSampler(dataset.groups, 4, num_batches=80, weights=weights)
    counts: Counter[str] = Counter()
    uses: Counter[int] = Counter()
    for batch in sampler:
        groups = {group_of(dataset[draw]) for draw in batch}
        assert len(groups) == 1
        assert len(batch) == 4
        counts.update(groups)
        uses.update(draw.index for draw in batch)
    assert counts == {"plain_text": 10, "video_object": 20, "text/image": 10, "image": 40}
    # 160 draws of 6 images: every shuffle uses each once before any comes again.
    images = [uses[index] for index in dataset.groups["image"]]
    assert max(images) - min(images) <= 1


def test_the_mix_is_spread_evenly() -> None:
    sampler = ModalityBatchSampler({"a": [0], "b": [1]}, 1, num_batches=40, weights={"a": 3.0, "b": 1.0})
    schedule = list(sampler.schedule())
    assert all(schedule[i : i + 4].count("b") == 1 for i in range(0, 40, 4))


def test_a_step_is_one_group_on_all_ranks() -> None:
    sampler = ModalityBatchSampler({"a": range(5), "b": range(5, 9)}, 2, num_batches=29, batches_per_step=4)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 32
    for step in range(8):
        indices = {draw.index < 5 for batch in batches[4 * step : 4 * step + 4] for draw in batch}
        assert len(indices) == 1


def test_draws_depend_on_seed_epoch_and_position_only() -> None:
    def draws(seed: int, epoch: int = 0) -> list[list[Draw]]:
        sampler = ModalityBatchSampler({"a": range(9), "b": range(9, 20)}, 4, num_batches=12, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(1) != draws(1, epoch=1)
    seeds = [draw.seed for epoch in (0, 1) for batch in draws(1, epoch) for draw in batch]
    assert len(set(seeds)) == len(seeds)


def test_empty_groups_are_refused() -> None:
    with pytest.raises(DataError, match=r"\['b'\] have no samples"):
        ModalityBatchSampler({"a": [0], "b": []}, 1)
