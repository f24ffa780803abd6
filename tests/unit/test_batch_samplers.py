"""Which samples make which batches: one modality per optimizer step on all ranks, shares, lengths, packed rows."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

from unimoe.errors import DataError
from unimoe.trainers.data.bad_samples import TolerantCollator
from unimoe.trainers.data.batching import Batching, make_sampler
from unimoe.trainers.data.conversations import ConversationDataset, group_of
from unimoe.trainers.data.data_sets import TrainingData, open_data
from unimoe.trainers.recipe.recipe_data import DataEntry

SIZES = {"text": 30, "image": 14, "speech": 9}
BATCH = 2


def record(modality: str, index: int) -> dict[str, Any]:
    words = " word" * (index * 7 % 40)
    messages = [{"role": "user", "content": f"Say {index}.{words}"}, {"role": "assistant", "content": "Yes."}]
    return {"id": f"{modality}-{index}", "modality": modality, "messages": messages}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file with everything, and one per modality."""
    folder = tmp_path_factory.mktemp("data")
    made = {}
    for name, modalities in {"all": list(SIZES), **{m: [m] for m in SIZES}}.items():
        made[name] = folder / f"{name}.jsonl"
        records = [record(modality, index) for modality in modalities for index in range(SIZES[modality])]
        records.sort(key=lambda one: int(one["id"].split("-")[1]))
        made[name].write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return made


class Lengths:
    """A processor, as far as lengths are concerned."""

    image_tokens, video_tokens, speech_tokens, sound_tokens = 4, 8, 5, 3


def batches(
    data: TrainingData, steps: int, per_step: int = 1, batching: Batching | None = None, **options: Any
) -> list[list[dict[str, Any]]]:
    sampler = make_sampler(data, batching or Batching(), BATCH, steps, per_step, 5, **options)
    made = [[data[draw] for draw in batch] for batch in sampler]  # type: ignore[index]
    assert len(made) == len(sampler) == steps * per_step
    return made


def stored(files: dict[str, Path]) -> TrainingData:
    return open_data([str(files["all"])])


def streamed(files: dict[str, Path]) -> TrainingData:
    return open_data([DataEntry(str(files["all"]), streaming=True, shuffle_buffer=8)])


def mixed_sources(files: dict[str, Path]) -> TrainingData:
    """A stream beside data in memory."""
    return open_data(
        [DataEntry(str(files["all"]), weight=3, streaming=True), DataEntry(str(files["image"]), weight=1)]
    )


KINDS = [stored, streamed, mixed_sources]


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("make", KINDS)
def test_an_optimizer_step_is_of_one_modality_on_all_ranks(
    make: Callable[..., TrainingData], files: dict[str, Path], ranks: int, accumulation: int, by_length: bool
) -> None:
    data = make(files)
    batching = Batching(by_length=by_length, processor=Lengths())
    sampler = make_sampler(data, batching, BATCH, 24, ranks * accumulation, 5)
    shards = [list(BatchSamplerShard(sampler, ranks, rank)) for rank in range(ranks)]
    assert all(len(shard) == 24 * accumulation for shard in shards)
    seen = []
    for step in range(24):
        own = [
            draw
            for shard in shards
            for batch in shard[step * accumulation : (step + 1) * accumulation]
            for draw in batch
        ]
        groups = {group_of(data[draw]) for draw in own}  # type: ignore[index]
        assert len(own) == ranks * accumulation * BATCH
        assert len(groups) == 1
        seen += list(groups)
    assert len(set(seen)) > 1


@pytest.mark.parametrize("batching", [Batching(), Batching(mixed=True), Batching(by_length=True, processor=Lengths())])
@pytest.mark.parametrize("make", KINDS)
def test_a_resumed_run_draws_what_the_whole_one_does(
    make: Callable[..., TrainingData], files: dict[str, Path], batching: Batching
) -> None:
    def sampler() -> Any:
        return make_sampler(make(files), batching, BATCH, 30, 2, 5)

    whole = list(BatchSamplerShard(sampler(), 2, 1))
    assert whole == list(BatchSamplerShard(sampler(), 2, 1))
    assert whole[17:] == list(SkipBatchSampler(BatchSamplerShard(sampler(), 2, 1), skip_batches=17))
    other = make_sampler(make(files), batching, BATCH, 30, 2, 6)
    assert whole != list(BatchSamplerShard(other, 2, 1))


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares_of_the_samples(files: dict[str, Path], streaming: bool) -> None:
    weights = {"text": 1.0, "image": 2.0, "speech": 5.0}
    entries = [DataEntry(str(files[name]), weight=w, streaming=streaming) for name, w in weights.items()]
    counts = Counter(s["modality"] for batch in batches(open_data(entries), 160) for s in batch)
    for name, weight in weights.items():
        # What still waits to fill a step is less than a step per group.
        assert abs(counts[name] - 320 * weight / 8) <= 2 * BATCH


def test_weights_hold_within_a_modality(files: dict[str, Path]) -> None:
    """Two data sets of the same modalities: three of four samples come from the small one."""
    data = open_data([DataEntry(str(files["all"]), weight=1), DataEntry(str(files["text"]), weight=3)])
    origin = dict(zip(map(id, data.samples), data.origins, strict=True))  # type: ignore[union-attr]
    sampler = make_sampler(data, Batching(), BATCH, 200, 1, 5)
    counts = Counter(origin[id(data.samples[draw.index])] for batch in sampler for draw in batch)  # type: ignore[union-attr]
    assert abs(counts[1] - 300) <= 4
    shares = make_sampler(data, Batching(), BATCH, 200, 1, 5, {"text": 0.5, "image": 0.5, "speech": 0}).shares  # type: ignore[union-attr]
    assert shares == {"text": 0.5, "image": 0.5}


@pytest.mark.parametrize("make", [stored, streamed])
def test_a_pass_takes_every_sample_once(make: Callable[..., TrainingData], files: dict[str, Path]) -> None:
    data = make(files).select(["image"])
    drawn = [s["id"] for batch in batches(data, 14) for s in batch]
    passes = drawn[: SIZES["image"]], drawn[SIZES["image"] :]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(f"image-{i}" for i in range(SIZES["image"]))
    assert passes[0] != passes[1]


@pytest.mark.parametrize("make", KINDS)
def test_mixed_batches_hold_what_comes(make: Callable[..., TrainingData], files: dict[str, Path]) -> None:
    made = batches(make(files), 40, batching=Batching(mixed=True))
    assert any(len({group_of(s) for s in batch}) > 1 for batch in made)


@pytest.mark.parametrize("make", [stored, streamed])
def test_steps_by_length_need_less_padding(make: Callable[..., TrainingData], files: dict[str, Path]) -> None:
    def padding(batching: Batching) -> int:
        made = batches(make(files).select(["text"]), 64, 2, batching)
        lengths = [[len(s["messages"][0]["content"]) for s in batch] for batch in made]
        return sum(max(row) * len(row) - sum(row) for row in lengths)

    assert padding(Batching(by_length=True, processor=Lengths())) < padding(Batching()) / 4


@pytest.mark.parametrize("make", [stored, streamed])
def test_packed_batches_hold_as_many_texts_as_fill_their_rows(
    make: Callable[..., TrainingData], files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "a.png").touch()
    both = tmp_path / "both.jsonl"
    picture = {"type": "image", "path": "a.png"}
    seen = record("image", 0) | {
        "messages": [{"role": "user", "content": [picture]}, {"role": "assistant", "content": "A."}]
    }
    both.write_text(files["text"].read_text() + (json.dumps(seen) + "\n") * 20, encoding="utf-8")
    sampler = make_sampler(make({"all": both}), Batching(texts_per_row=3), BATCH, 12, 2, 5)
    assert sampler.batch_size is None
    shards = [list(BatchSamplerShard(sampler, 2, rank)) for rank in (0, 1)]
    sizes = Counter((len(one), len(other)) for one, other in zip(*shards, strict=True))
    assert set(sizes) == {(BATCH, BATCH), (3 * BATCH, 3 * BATCH)}


def test_broken_records_of_a_stream_are_counted_and_cost_no_other(files: dict[str, Path], tmp_path: Path) -> None:
    lines = files["text"].read_text(encoding="utf-8").splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        "\n".join([*lines[:4], "{", *lines[4:9], json.dumps({"messages": []}), *lines[9:]]), encoding="utf-8"
    )

    class Collator:
        def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
            for sample in samples:
                if "fault" in sample:
                    raise DataError(sample["fault"])
            return {"ids": [sample["id"] for sample in samples]}

    data = open_data([DataEntry(str(broken), streaming=True, shuffle_buffer=1)])
    made = [TolerantCollator(Collator())(batch) for batch in batches(data, 16)]
    assert [name for batch in made for name in batch["ids"]] == [json.loads(line)["id"] for line in lines]
    bad = [pair for batch in made for pair in batch.get("bad_samples", ())]
    assert [name for name, _ in bad] == [f"{broken}:5", f"{broken}:11"]
    assert "is not JSON" in bad[0][1]


def test_data_without_what_is_asked_for_end_the_run(files: dict[str, Path]) -> None:
    data = open_data(
        [DataEntry(str(files["text"]), weight=1, streaming=True), DataEntry(str(files["image"]), weight=1)]
    ).select(["image"])
    with pytest.raises(DataError, match=r"text\.jsonl has no sample of image: leave it out"):
        batches(data, 4)
    with pytest.raises(DataError, match="no end: set max_steps"):
        make_sampler(data, Batching(), BATCH, None, 1, 5)


def test_data_in_memory_have_a_pass_of_steps(files: dict[str, Path]) -> None:
    data = stored(files)
    assert isinstance(data, ConversationDataset)
    assert len(make_sampler(data, Batching(), BATCH, None, 1, 5)) == sum(SIZES.values()) // BATCH
