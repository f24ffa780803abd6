"""Uni-MoE's own data files: read lazily and exactly, their oddities handled or refused."""

import base64
import json
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import tiny_media
import torch

from unimoe.errors import DataError
from unimoe.processing.processing_unimoe import VICUNA_CHAT_TEMPLATE
from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.data.conversations import ConversationDataset, media_items, read_samples
from unimoe.trainers.data.json_records import read_records
from unimoe.trainers.data.media_paths import MediaPaths
from unimoe.trainers.data.original_data import convert
from unimoe.trainers.data.original_sampler import OriginalBatchSampler, original_order, type_of
from unimoe.trainers.data.streaming import stream_conversations


def record(*texts: str, **keys: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **keys}


def shown(sample: dict[str, Any]) -> list[str]:
    """The messages with `<kind:source>` for media."""
    texts = []
    for message in sample["messages"]:
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        sources = [item.get("path") or item.get(item["type"]) for item in items]
        pairs = zip(items, sources, strict=True)
        texts.append("".join(i["text"] if i["type"] == "text" else f"<{i['type']}:{s}>" for i, s in pairs))
    return texts


def written(folder: Path, *records: Any, name: str = "data.json", lines: bool = False) -> Path:
    file = folder / name
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data file's folder with media/{a.png,b.png,s.wav,t.wav,clip.mp4}."""
    media = tmp_path / "media"
    media.mkdir()
    for name in "ab":
        (media / f"{name}.png").write_bytes(tiny_media.encoded_picture())
    for name in "st":
        (media / f"{name}.wav").write_bytes(tiny_media.wav(tiny_media.sound(0.2)))
    (media / "clip.mp4").write_bytes(tiny_media.video(frames=4))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "modality", "messages"),
    [
        (record("Hi", "Hello"), "text", ["Hi", "Hello"]),
        (record("<image>\nWhat?", "A cat", image="a.png"), "image", ["<image:a.png>\nWhat?", "A cat"]),
        (record("See <image>.", "A", image=["a.png"]), "image", ["See <image:a.png>.", "A"]),
        (
            record("<audio>", "A", "<audio>\nB", "C", voice=["s.wav", "t.wav"]),
            "speech",
            ["<audio:s.wav>", "A", "<audio:t.wav>\nB", "C"],
        ),
        (
            record("<audio>\n<video>\nWhat?", "A", voice="s.wav", video=["1.png", "2.png"]),
            "video+speech",
            ["<audio:s.wav><video:['1.png', '2.png']>".replace("><", ">\n<") + "\nWhat?", "A"],
        ),
        (record("<video>?", "A", video="clip.mp4"), "video", ["<video:clip.mp4>?", "A"]),
        (
            record("<video><video>?", "A", video=[["1.png"], "clip.mp4"]),
            "video",
            ["<video:['1.png']><video:clip.mp4>?", "A"],
        ),
    ],
)
def test_records_become_conversations(given: dict[str, Any], modality: str, messages: list[str]) -> None:
    sample = convert({"id": 7, "multi_info": {"tokens": 3}, **given}, "here")
    assert (sample["id"], sample["modality"], sample["task"]) == ("7", modality, modality)
    assert shown(sample) == messages
    assert sample["source"] == {"multi_info": {"tokens": 3}}
    assert "remarks" not in sample


def test_images_may_be_base64() -> None:
    picture = tiny_media.encoded_picture()
    sample = convert(record("<image>", "A", image=base64.b64encode(picture).decode()), "here")
    assert next(media_items(sample))["image"] == picture


# Each oddity: what ours makes of it, what the original makes of it.
ODDITIES = [
    (
        record("Listen.", "A", voice=["s.wav"]),
        ["<audio:s.wav>\nListen.", "A"],
        ["Listen.", "A"],
        "voice without <audio>",
    ),
    (
        record("<video>\nSee", "A", video=["1.png"], voice=["s.wav"]),
        ["<audio:s.wav>\n<video:['1.png']>\nSee", "A"],
        ["<video:['1.png']>\nSee", "A"],
        "voice without <audio>",
    ),
    (record("<video>\nSee", "A", video=["1.png"]), ["<video:['1.png']>\nSee", "A"], ["<video>\nSee", "A"], None),
    (record("<image> <image>", "A", image="a.png"), DataError, ["<image:a.png> <image:None>", "A"], None),
    (record("<audio>", "A", voice=["s.wav", "t.wav"]), DataError, ["<audio:s.wav>", "A"], None),
    (record("What is <video>?", "A"), ["What is <video>?", "A"], ["What is <video>?", "A"], "stays text"),
    (record("Q", ""), ["Q"], ["Q", ""], None),
    (record("Q", "", "R", "A"), DataError, ["Q", "", "R", "A"], None),
]


@pytest.mark.parametrize(("given", "ours", "theirs", "remark"), ODDITIES)
def test_oddities_are_right_by_default(given: dict[str, Any], ours: Any, theirs: Any, remark: str | None) -> None:
    assert shown(convert(given, "here", original_rules="unimoe")) == theirs
    if ours is DataError:
        with pytest.raises(DataError, match="here: "):
            convert(given, "here")
        return
    sample = convert(given, "here")
    assert shown(sample) == ours
    assert [text for text in sample.get("remarks", []) if remark and remark in text] == sample.get("remarks", [])
    assert bool(sample.get("remarks")) == bool(remark)


def test_a_leading_answer_is_dropped() -> None:
    turns = [{"from": "gpt", "value": "Hello."}, *record("Q", "A")["conversations"]]
    sample = convert({"conversations": turns}, "here")
    assert shown(sample) == ["Q", "A"]
    assert sample["remarks"] == ["a leading answer is dropped"]


# Bunny's rules, which MoIIE uses: what they make of records that ours reads as they stand.
BUNNY = [
    (record("<image>\nWhat? ", "A", image="a.png"), ["<image:a.png>\nWhat? ", "A"]),
    (record("See <image> here. ", "A", image="a.png"), ["<image:a.png>\nSee  here.", "A"]),
    (record("See <image>", "A <image>!", image=["a.png", "b.png"]), ["<image:a.png>\nSee", "<image:b.png>\nA !"]),
    (record(" <image>", "A", image="a.png"), ["<image:a.png>", "A"]),
    (record("1 <image> 2 <image>", "A", image=["a.png", "b.png"]), ["1 <image:a.png> 2 <image:b.png>", "A"]),
    (record("See <image>.", "A"), ["See <image>.", "A"]),
    (record("<image> <audio>", "A", image="a.png"), ["<image:a.png> <audio>", "A"]),
    (record("What?", "A", image="a.png"), ["What?", "A"]),
    (record("<image> <image>", "", image="a.png"), ["<image:a.png> <image:None>", ""]),
]


@pytest.mark.parametrize(("given", "theirs"), BUNNY)
def test_bunnys_rules(given: dict[str, Any], theirs: list[str]) -> None:
    assert shown(convert(given, "here", original_rules="bunny")) == theirs


def test_files_of_several_images_and_none_load_like_any_other(folder: Path) -> None:
    file = written(
        folder,
        record("First <image>, second <image>?", "A", image=["media/a.png", "media/b.png"], id=1),
        record("<image>\nWhat?", "A", image="media/a.png", id=2),
        record("Two primes?", "3 and 5.", id=3),
    )
    samples = ConversationDataset([file]).samples
    assert [sample["modality"] for sample in samples] == ["image", "image", "text"]
    made = tiny_media.processor("image")
    batch = RawCollator(made)(samples)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert (batch["input_ids"] == made.image_token_id).sum(dim=1).tolist() == [8, 4, 0]
    moved = list(read_samples(file, original_rules="bunny"))
    assert [shown(sample) for sample in moved] == [shown(sample) for sample in samples]


def test_unknown_rules_are_named() -> None:
    with pytest.raises(DataError, match="original_rules is 'llava'"):
        convert(record("Hi", "Ho"), "here", original_rules="llava")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conversations": []}, "at least one turn"),
        ({"conversations": [{"from": "human"}]}, "turn 0 must have"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0 must have"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "turn 0 must have"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "an answer only"),
        (
            {"conversations": record("a", "b")["conversations"] * 2 + record("c")["conversations"] * 2},
            "follow each other",
        ),
        (record("<image>", "A", image=3), "'image' is a int"),
        (record("<audio>", "A", voice=[["s.wav"]]), "'voice' holds"),
        (record("<image>", "A", image=["a.png", ""]), "'image' holds ''"),
        (record("<image>", "A", voice="s.wav"), r"1 <image> for 0 under 'image'"),
        (record("<audio>", "A", audio=["s.wav"]), r"no 'voice'; did you mean 'voice' where it says 'audio'\?"),
        (record("<image><audio>", "A", image="a.png", Audio="s.wav"), "did you mean 'voice' where it says 'Audio'"),
        (record("<image>", "A", imgae="a.png"), "did you mean 'image' where it says 'imgae'"),
        (record("<image>", "A", image=""), "'image' is empty, but the text has <image>"),
        (record("<video>", "A", video=[]), "'video' is empty, but the text has <video>"),
    ],
)
def test_malformed_records_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^here.*{message}"):
        convert(given, "here")


def test_other_fields_and_empty_ones_are_no_misspelt_media() -> None:
    for given in (record("What is <audio>?", "A", model="x", image=None), record("Hi", "A", audio="unused", image="")):
        assert convert(given, "here")["modality"] == "text"


def test_voices_may_be_sounds(folder: Path) -> None:
    file = written(folder, record("<image><audio>", "A", image="media/a.png", voice="media/s.wav"), name="theirs")
    clip = {"role": "user", "content": [{"type": "audio", "path": "media/s.wav"}, {"type": "text", "text": "What?"}]}
    ours = {"messages": [clip, {"role": "assistant", "content": "A"}]}
    other = written(folder, ours, {**ours, "modality": "speech"}, name="ours")

    def modalities(**options: Any) -> list[str]:
        return [sample["modality"] for sample in ConversationDataset([file, other], **options).samples]

    assert modalities() == ["image+speech", "speech", "speech"]
    assert modalities(voice_as="sound") == ["image+sound", "sound", "speech"]
    with pytest.raises(DataError, match="voice_as is 'music'"):
        modalities(voice_as="music")
    pytest.importorskip("datasets")
    assert [sample["modality"] for sample in stream_conversations([file], voice_as="sound")] == ["image+sound"]


def test_absolute_paths_are_found_below_the_media_root(folder: Path) -> None:
    root = folder / "media"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "a.png").touch()
    paths = MediaPaths(folder, root)
    assert paths("/home/them/sets/deep/er/a.png") == str(root / "deep/er/a.png")
    assert paths("/home/them/sets/a.png") == str(root / "a.png")
    assert paths("/gone/x.png") == str(root / "gone/x.png")
    assert paths("b.png") == str(root / "b.png")
    assert MediaPaths(folder)("/home/them/a.png") == "/home/them/a.png"
    assert MediaPaths(folder)("media/a.png") == str(root / "a.png")
    (folder / "secret.png").touch()
    assert paths("/deep/../../secret.png") == str(root / "secret.png")


@pytest.mark.parametrize("lines", [False, True])
def test_data_sets_take_the_files_by_what_they_hold(folder: Path, lines: bool) -> None:
    theirs = record("<image>\nWhat?", "A cat", image="/elsewhere/a.png", id="x")
    ours = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    file = written(folder, theirs, ours, name="any.name", lines=lines)
    dataset = ConversationDataset([file], media_root=folder / "media")
    assert [sample["modality"] for sample in dataset.samples] == ["image", "text"]
    assert next(media_items(dataset[0]))["path"] == str(folder / "media" / "a.png")
    with pytest.raises(DataError, match=r"1 media files are missing: /elsewhere/a\.png \(of x\)"):
        ConversationDataset([file])


def test_missing_frames_are_found(folder: Path) -> None:
    file = written(folder, record("<video>", "A", video=["media/a.png", "media/none.png"]))
    with pytest.raises(DataError, match=r"1 media files are missing: .*none\.png"):
        ConversationDataset([file])


def test_batches_come_out_of_the_files(folder: Path) -> None:
    file = written(
        folder,
        record("<video>\nWhat?", "A cat", video=["media/a.png", "media/b.png", "media/a.png"]),
        record("<video>\nWho?", "A dog", video="media/clip.mp4"),
    )
    processor = tiny_media.processor(chat_template=VICUNA_CHAT_TEMPLATE)
    batch = RawCollator(processor)(ConversationDataset([file]).samples)
    assert batch["pixel_values_videos"].shape == (2, 2, 3, 16, 16)
    assert "USER: <video><video>" in processor.tokenizer.decode(batch["input_ids"][0])


def test_streams_are_the_same_samples(folder: Path) -> None:
    pytest.importorskip("datasets")
    first = written(folder, *(record("<image>", str(i), image="media/a.png") for i in range(3)))
    second = written(folder, record("Hi", "Hello"), name="second.json", lines=True)
    streamed = stream_conversations([first, second])
    assert streamed.num_shards == 2
    samples = list(streamed)
    assert [sample["messages"] for sample in samples] == [
        *(sample["messages"] for file in (first, second) for sample in read_samples(file))
    ]
    assert [sample["id"] for sample in streamed.skip(1).take(1)] == [f"{first}, record 2"]


def test_streaming_without_datasets_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'unimoe\[data\]'"):
        stream_conversations([folder / "data.json"])


# ---- records of a file


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_records_survive_any_chunk_size(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimoe.trainers.data.json_records._CHUNK", chunk)
    values = [{"a": 'x]}"[,\n é'}, [1, [2]], 12345, "text", None, {"b": {"c": [1.5e3]}}]
    for text in (json.dumps(values), json.dumps(values, indent=2), json.dumps(values, ensure_ascii=False)):
        (tmp_path / "list").write_text(text, encoding="utf-8")
        read = list(read_records(tmp_path / "list"))
        assert [r.value for r in read] == values
        assert [r.number for r in read] == list(range(1, 7))
        assert all(r.error is None for r in read)
    (tmp_path / "lines").write_text("\n\n".join(json.dumps({"n": n}) for n in range(4)) + "\n", encoding="utf-8")
    assert [(r.number, r.value["n"]) for r in read_records(tmp_path / "lines")] == [(1, 0), (3, 1), (5, 2), (7, 3)]
    for empty in ("", " \n", "[]", " [ ]\n"):
        (tmp_path / "empty").write_text(empty, encoding="utf-8")
        assert list(read_records(tmp_path / "empty")) == []


@pytest.mark.parametrize("text", ["[1, 2", "[1 2]", "[1,]", "[1] x", "[1, {]", "[" * 100_000])
def test_broken_lists_end_with_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text, encoding="utf-8")
    *before, last = read_records(tmp_path / "list")
    assert last.error
    assert all(record.error is None for record in before)


@pytest.mark.parametrize("form", ["{}", "[{}]"])
def test_numbers_without_end_are_an_error_of_their_record(form: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(form.replace("{}", '{"x": ' + "1" * 5000 + "}"))
    [record] = read_records(tmp_path / "data.json")
    assert record.error == "a number is too long"


def test_memory_stays_bounded(tmp_path: Path) -> None:
    with (tmp_path / "big.json").open("w") as file:
        file.write("[" + ",".join(json.dumps(record("x" * 1000, "y" * 1000)) for _ in range(8000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_samples(tmp_path / "big.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert peak < 8 << 20  # the file has 17 MB


# ---- the original's orders


def test_original_batches(folder: Path) -> None:
    words = random.Random(0)
    records = [
        record(
            f"{'<image>' if i % 3 else ''} {'w ' * words.randint(1, 30)}", "A", **({"image": "a.png"} if i % 3 else {})
        )
        for i in range(40)
    ]
    dataset = ConversationDataset([written(folder, *records)], check_media=False)
    sampler = OriginalBatchSampler(dataset, "modality_type", batch_size=2, world_size=3, seed=5)
    batches = [[draw.index for draw in batch] for batch in sampler]
    assert len(batches) == len(sampler) == 3 * ((13 // 6 if 14 % 6 else 14 // 6 - 1) + 26 // 6)
    for start in range(0, len(batches), 3):
        assert len({type_of(dataset[i]) for batch in batches[start : start + 3] for i in batch}) == 1
    again = [[draw.index for draw in batch] for batch in sampler]
    sampler.set_epoch(1)
    assert batches == again
    assert batches != [[draw.index for draw in batch] for batch in sampler]


def test_8e_sorts_each_type_by_length() -> None:
    torch.manual_seed(0)
    order = original_order("modality_type_sorted", [3, 9, 1, 7, 5, 2, 8], [1, 1, 1, 1, 0, 0, 0], 1, 2)
    assert sorted(order) == [1, 3, 4, 6]
    assert order in ([1, 3, 6, 4], [6, 4, 1, 3])
    with pytest.raises(DataError, match="rule is 'none'"):
        original_order("none", [1], [1], 1, 1)
