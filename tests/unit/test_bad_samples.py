"""Unreadable samples: left out and listed while they are few, the end of the run when they are many."""

import json
import math
from pathlib import Path

import pytest
import tiny_training

from unimoe.errors import DataError, MediaError
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.data.bad_samples import FILE, BadSamples, TolerantCollator
from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.recipe.recipe import Recipe, StageConfig


def run(
    folder: Path, broken: dict[str, bytes | None], allowed: float, cached: bool = False, batch_size: int = 2
) -> list[dict[str, str]]:
    """Train a few steps on pictures of which some files are broken or (None) missing; returns what was listed."""
    processor = tiny_training.processor()
    data = tiny_training.write_jsonl(folder / "data", 8)
    for name, content in broken.items():
        file = data.parent / name
        file.unlink() if content is None else file.write_bytes(content)
    stage = StageConfig("tune", modalities=["image"], steps=12 // batch_size, batch_size=batch_size, log_every=1)
    recipe = Recipe("in memory", [str(data)], str(folder / "out"), [stage], max_bad_samples=allowed)
    if cached:
        recipe.cache = str(folder / "cache")
    run_curriculum(recipe, tiny_training.model(processor), processor, progress_bar=False)
    listed = folder / "out" / "tune" / FILE
    return [json.loads(line) for line in listed.read_text().splitlines()] if listed.is_file() else []


@pytest.mark.parametrize("cached", [False, True], ids=["raw", "cached"])
def test_few_bad_samples_are_left_out_and_listed(tmp_path: Path, cached: bool) -> None:
    listed = run(tmp_path, {"1.png": b"no picture", "3.png": None}, 0.3, cached)
    assert len(listed) == 2
    reasons = {record["id"]: record["reason"] for record in listed}
    assert sorted("missing" in reason for reason in reasons.values()) == [False, True]
    assert any("MediaError" in reason for reason in reasons.values())


def test_a_step_of_bad_samples_only_is_no_error(tmp_path: Path) -> None:
    listed = run(tmp_path, {"1.png": b"no picture"}, 0.2, batch_size=1)
    assert len(listed) == 1
    losses = [json.loads(line) for line in (tmp_path / "out" / "tune" / "losses.jsonl").read_text().splitlines()]
    assert 0.0 in [record["ce_loss"] for record in losses]
    assert all(math.isfinite(record["loss"]) for record in losses)


@pytest.mark.parametrize("cached", [False, True], ids=["raw", "cached"])
def test_too_many_end_the_run(tmp_path: Path, cached: bool) -> None:
    # 2 of the 8 pictures, and the stage sees pictures only.
    with pytest.raises(
        DataError, match=r"2 of 8 samples .* \(0.2 of them\).*bad_samples.jsonl. The first: image-[12]: MediaError"
    ):
        run(tmp_path, {"1.png": b"no picture", "2.png": b"\x89PNG"}, 0.2, cached)
    assert len((tmp_path / "out" / "tune" / FILE).read_text().splitlines()) == 2


def test_none_are_allowed_with_zero(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 media files are missing"):
        run(tmp_path / "missing", {"1.png": None}, 0.0)
    with pytest.raises(DataError, match="1 of 8 samples"):
        run(tmp_path / "broken", {"1.png": b""}, 0.0)


@pytest.mark.parametrize("cached", [False, True], ids=["raw", "cached"])
def test_nothing_outside_of_the_media_root_is_opened(tmp_path: Path, cached: bool) -> None:
    processor = tiny_training.processor()
    data = tiny_training.write_jsonl(tmp_path / "data", 6)
    root = data.parent
    (root / "1.png").rename(tmp_path / "secret.png")
    (root / "1.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "other").mkdir()
    (root / "2.png").rename(tmp_path / "other" / "2.png")
    (root / "folder").symlink_to(tmp_path / "other", target_is_directory=True)
    data.write_text(data.read_text().replace('"2.png"', '"folder/2.png"').replace('"3.png"', '"../secret.png"'))

    stage = StageConfig("tune", modalities=["image"], steps=2, batch_size=6, log_every=1)
    recipe = Recipe("in memory", [str(data)], str(tmp_path / "out"), [stage], max_bad_samples=0.9)
    recipe.media_root, recipe.cache = str(root), str(tmp_path / "cache") if cached else None
    run_curriculum(recipe, tiny_training.model(processor), processor, progress_bar=False)
    listed = [json.loads(line) for line in (tmp_path / "out" / "tune" / FILE).read_text().splitlines()]
    assert sorted(record["id"] for record in listed) == ["image-1", "image-2", "image-3"]
    assert all("outside of media_root" in record["reason"] for record in listed)
    assert processor.media_policy.media_root is None


def test_the_rest_of_a_batch_stays_as_it_is(tmp_path: Path) -> None:
    processor = tiny_training.processor()
    dataset = ConversationDataset([tiny_training.write_jsonl(tmp_path, 4)]).select(["image"])
    (tmp_path / "2.png").write_bytes(b"no picture")
    collator = RawCollator(processor)
    samples = [dataset[i] for i in range(4)]
    with pytest.raises(MediaError):
        collator(samples)
    batch = TolerantCollator(collator)(samples)
    assert [name for name, _ in batch.pop("bad_samples")] == [samples[2]["id"]]
    expected = collator([samples[i] for i in (0, 1, 3)])
    assert batch["sample_ids"] == expected["sample_ids"]
    for name in ("input_ids", "labels", "attention_mask", "pixel_values"):
        assert batch[name].equal(expected[name])


def test_a_batch_without_a_readable_sample_teaches_nothing(tmp_path: Path) -> None:
    processor = tiny_training.processor()
    dataset = ConversationDataset([tiny_training.write_jsonl(tmp_path, 4)]).select(["image"])
    (tmp_path / "2.png").write_bytes(b"no picture")
    batch = TolerantCollator(RawCollator(processor))([dataset[2]])
    assert batch["labels"].tolist() == [[-100]]
    assert batch["input_ids"].shape == (1, 1)
    assert "pixel_values" not in batch


def test_a_list_goes_on_after_a_kill(tmp_path: Path) -> None:
    first = BadSamples(tmp_path, 100, 0.02)
    first.note([("a", "broken"), ("a", "broken")])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"id": "half')
    again = BadSamples(tmp_path, 100, 0.02)
    again.note([("b", "broken")])
    with pytest.raises(DataError, match="3 of 100 samples"):
        again.note([("c", "broken")])


@pytest.mark.parametrize(("every", "stops"), [(200, False), (50, True)], ids=["0.5%", "2%"])
def test_a_run_need_not_see_all_data_to_know_that_they_are_bad(tmp_path: Path, every: int, stops: bool) -> None:
    """At most 1 % may be bad of a million samples, of which the run will see a fraction."""
    listed = BadSamples(tmp_path, 1_000_000, 0.01)

    def see(count: int) -> int:
        for index in range(0, count, every):
            listed.note([(f"sample-{index}", "broken")], readable=every - 1)
        return count

    if not stops:
        assert see(50_000) == 50_000
        return
    with pytest.raises(DataError, match=r"of the first (\d+) samples cannot be read, more than max_bad_samples"):
        see(50_000)
    assert len(listed.reasons) < 100
