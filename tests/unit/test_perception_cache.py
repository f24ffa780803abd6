"""`unimoe perceive DATA`: every image once, by content and by perceiver; a kill loses little and breaks nothing."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from unimoe import cli
from unimoe.errors import DataError, MediaError
from unimoe.processing.media_policy_unimoe import MediaPolicy
from unimoe.processing.perception.perceiver import Perceiver
from unimoe.processing.perception.results import Perception, Segment, Segmentation, TextLine
from unimoe.trainers.caches import perception_cache
from unimoe.trainers.caches.perceive_data import carry_out, data_samples, open_cache, plan_perception
from unimoe.trainers.caches.perception_cache import PerceptionCache


class CountingReader:
    """Reads the image's width, and counts the images; stops after so many."""

    def __init__(self, stop_after: int | None = None, name: str = "width") -> None:
        self.seen: list[int] = []
        self.stop_after = stop_after
        self.name = name

    def identity(self) -> dict[str, Any]:
        return {"adapter": self.name}

    def read(self, images: Sequence[PIL.Image.Image]) -> list[tuple[TextLine, ...]]:
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += [image.width for image in images]
        return [(TextLine(f"{image.width} wide", 0.95),) for image in images]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten samples of nine different files, of which two have the same content, and a text sample."""
    records = []
    for number in range(10):
        name = f"{min(number, 8)}.png"
        PIL.Image.new("RGB", (10 + min(number, 7), 8), (number, 0, 0) if number < 7 else "red").save(tmp_path / name)
        question = [{"type": "image", "path": name}, {"type": "text", "text": "?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "!"}]
        records.append({"id": str(number), "messages": messages})
    records.append({"text": "no image"})
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_every_image_is_perceived_once(data: Path, tmp_path: Path) -> None:
    reader = CountingReader()
    perceiver, samples = Perceiver(reader=reader), data_samples([data])
    cache = open_cache(tmp_path / "seen", perceiver)
    plan = plan_perception(samples, cache)
    assert (plan.samples, plan.images, plan.known, len(plan.missing)) == (11, 9, 0, 8)
    assert carry_out(plan, perceiver, cache, batch_size=3, progress=False) == 8
    assert sorted(reader.seen) == [10, 11, 12, 13, 14, 15, 16, 17]

    again = PerceptionCache(tmp_path / "seen")
    assert len(again) == 8
    assert again.identity == perceiver.identity()
    assert [again.texts_of(sample) for sample in samples[:2]] == [
        ["The image includes text descriptions: 10 wide."],
        ["The image includes text descriptions: 11 wide."],
    ]
    assert again.of_sample(samples[-1]) == []
    assert again.of_sample(samples[9]) == again.of_sample(samples[7])  # by content
    assert not plan_perception(samples, again).missing


def test_samples_carry_what_was_seen(data: Path, tmp_path: Path) -> None:
    perceiver, samples = Perceiver(reader=CountingReader()), data_samples([data])
    cache = open_cache(tmp_path / "seen", perceiver)
    carry_out(plan_perception(samples, cache), perceiver, cache, progress=False)
    sample = cache.with_aux(samples[1])
    image, text = sample["messages"][0]["content"]
    assert image == {**samples[1]["messages"][0]["content"][0], "aux": {"text": cache.texts_of(samples[1])[0]}}
    assert text == samples[1]["messages"][0]["content"][1]
    assert "aux" not in samples[1]["messages"][0]["content"][0]
    assert cache.with_aux(samples[-1]) == samples[-1]


def test_a_stop_keeps_what_was_done(data: Path, tmp_path: Path) -> None:
    samples = data_samples([data])
    stopped = Perceiver(reader=CountingReader(stop_after=4))
    cache = open_cache(tmp_path / "seen", stopped)
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan_perception(samples, cache), stopped, cache, batch_size=2, progress=False)
    rest = Perceiver(reader=CountingReader())
    cache = open_cache(tmp_path / "seen", rest)
    plan = plan_perception(samples, cache)
    assert (plan.known, len(plan.missing)) == (4, 4)
    carry_out(plan, rest, cache, progress=False)
    assert sorted(rest.reader.seen + stopped.reader.seen) == [10, 11, 12, 13, 14, 15, 16, 17]


def test_a_kill_at_any_write_leaves_a_cache_that_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    written: list[str] = []

    def killed_before_the_end(path: Path, text: str) -> None:
        if path.suffix == ".jsonl" and len(written) == 1:
            path.with_name(f"{path.name}.new").write_text(text[: len(text) // 2])
            raise Killed
        write(path, text)
        if path.suffix == ".jsonl":
            written.append(path.name)

    write = perception_cache.write_durably
    monkeypatch.setattr(perception_cache, "write_durably", killed_before_the_end)
    monkeypatch.setattr(perception_cache, "RESULTS_PER_FILE", 3)
    perceiver, samples = Perceiver(reader=CountingReader()), data_samples([data])
    cache = open_cache(tmp_path / "seen", perceiver)
    with pytest.raises(Killed):
        carry_out(plan_perception(samples, cache), perceiver, cache, batch_size=1, progress=False)
    monkeypatch.undo()
    assert len(PerceptionCache(tmp_path / "seen")) == 3
    cache = open_cache(tmp_path / "seen", perceiver)
    carry_out(plan_perception(samples, cache), perceiver, cache, progress=False)
    assert len(PerceptionCache(tmp_path / "seen")) == 8


def test_results_of_other_perceivers_are_not_mixed(data: Path, tmp_path: Path) -> None:
    samples, perceivers = data_samples([data]), [Perceiver(reader=CountingReader(name=name)) for name in "ab"]
    for perceiver in perceivers:
        cache = open_cache(tmp_path / "seen", perceiver)
        carry_out(plan_perception(samples, cache), perceiver, cache, progress=False)
        assert len(perceiver.reader.seen) == 8
    with pytest.raises(DataError, match="2 perceivers"):
        PerceptionCache(tmp_path / "seen")
    assert len(PerceptionCache(tmp_path / "seen", perceivers[1].digest())) == 8
    with pytest.raises(DataError, match="no results of nobody"):
        PerceptionCache(tmp_path / "seen", "nobody")


def test_damage_is_named(data: Path, tmp_path: Path) -> None:
    perceiver, samples = Perceiver(reader=CountingReader()), data_samples([data])
    cache = open_cache(tmp_path / "seen", perceiver)
    carry_out(plan_perception(samples[:1], cache), perceiver, cache, progress=False)
    (file,) = cache.folder.glob("seen-*.jsonl")
    with pytest.raises(DataError, match="unimoe perceive DATA"):
        PerceptionCache(tmp_path / "seen").of_sample(samples[3])
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=f"{file.name} has"):
        PerceptionCache(tmp_path / "seen")
    file.write_bytes(whole[:-9] + b"#" * 9)
    with pytest.raises(DataError, match="damaged"):
        PerceptionCache(tmp_path / "seen").of_sample(samples[0])


def test_results_of_every_kind_come_back(tmp_path: Path) -> None:
    image = PIL.Image.new("RGB", (4, 3))
    ids = np.array([[1, 1, 0, 0]] * 3, dtype=np.int32)
    seen = Perception(4, 3, Segmentation(ids, (Segment(1, "Straße", 0.5, 3),)), lines=())
    cache = PerceptionCache.create(tmp_path, {"adapter": "x"}, "x")
    cache.add(cache.digest(image), seen)
    assert cache.perception(image) == seen  # before it is written, too
    cache.flush()
    assert PerceptionCache(tmp_path).perception(image) == seen


def test_images_outside_of_the_media_root_stay_closed(data: Path, tmp_path: Path) -> None:
    perceiver, samples = Perceiver(reader=CountingReader()), data_samples([data])
    root = tmp_path / "elsewhere"
    root.mkdir()
    cache = open_cache(tmp_path / "seen", perceiver, MediaPolicy(media_root=str(root)))
    plan = plan_perception(samples, cache)
    assert len(plan.unreadable) == 9
    assert not plan.missing
    with pytest.raises(MediaError, match="media_root"):
        cache.perception(str(data.parent / "0.png"))


def test_the_command_says_what_it_does_and_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unimoe.commands import perceive

    (tmp_path / "3.png").write_bytes(b"no image")
    reader = CountingReader()
    monkeypatch.setattr(perceive, "chosen_perceiver", lambda args: Perceiver(reader=reader))
    command = ["perceive", str(data), "--out", str(tmp_path / "seen")]
    assert cli.main(command) == perceive.EXIT_PROBLEMS
    out = capsys.readouterr().out
    assert "11 samples with 9 images, 0 of them in" in out
    assert "reader: adapter width" in out
    assert "3.png: not a readable image" in out
    assert cli.main(command) == perceive.EXIT_PROBLEMS
    assert "9 images, 8 of them" in capsys.readouterr().out  # 7 results, one of them of two files
    assert len(reader.seen) == 7


@pytest.mark.parametrize(
    "arguments", [["a.png", "b.png"], ["a.jsonl"], ["a.png", "--out", "x"], ["a.jsonl", "--out", "x", "--show"]]
)
def test_unclear_commands_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["perceive", *arguments]) == cli.EXIT_ERROR
    assert "image" in capsys.readouterr().err


def test_an_image_is_drawn_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (30, 20), "green").save("a.png")
    corners = [[2, 2], [20, 2], [20, 12], [2, 12]]
    record = {"image": "a.png", "width": 30, "height": 20, "lines": [["STOP\x1b[2J", 0.99, corners]]}
    Path("seen.jsonl").write_text(json.dumps(record))
    assert cli.main(["perceive", "a.png", "--replay", "seen.jsonl", "--show"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The image includes text descriptions: STOP\\x1b[2J.\n")
    assert PIL.Image.open("a.seen.png").width >= 960
    assert cli.main(["perceive", "a.png", "--replay", "seen.jsonl", "--json"]) == 0
    assert cli.main(["perceive", "a.png", "--replay", "seen.jsonl", "--show", "picture.xyz"]) == cli.EXIT_ERROR
    again = Perception.from_json(json.loads(capsys.readouterr().out.splitlines()[0]))
    assert again == replace(Perception.from_json(record))


@pytest.mark.parametrize("content", [b"", b'{"reader": {"ada', b"\xff\xfe", b"[]"])
def test_a_damaged_identity_is_told_and_can_be_written_anew(content: bytes, data: Path, tmp_path: Path) -> None:
    perceiver = Perceiver(reader=CountingReader())
    cache = open_cache(tmp_path / "seen", perceiver)
    carry_out(plan_perception(data_samples([data]), cache), perceiver, cache, batch_size=3, progress=False)
    file = cache.folder / "perceiver.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"perceiver\.json is damaged .*remove this one file and run `unimoe perceive"):
        _ = cache.identity
    file.unlink()
    again = open_cache(tmp_path / "seen", perceiver)
    assert again.identity == perceiver.identity()
    assert len(again) == 8
