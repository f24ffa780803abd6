"""`unimoe check-data`: every kind of problem is found, counted, and its first case named."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_media

from unimoe import cli
from unimoe.trainers.data import check_data as module
from unimoe.trainers.data.check_data import check_data


def ours(*content: dict[str, Any], **keys: Any) -> dict[str, Any]:
    question = {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}
    return {"messages": [question, {"role": "assistant", "content": "This."}], **keys}


def theirs(text: str, **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "This."}], **keys}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.png").write_bytes(tiny_media.encoded_picture())
    (tmp_path / "good.wav").write_bytes(tiny_media.wav(tiny_media.sound(0.1)))
    (tmp_path / "good.mp4").write_bytes(tiny_media.video(frames=3, track=True))
    (tmp_path / "silent.mp4").write_bytes(tiny_media.video(frames=3))
    for name in ("bad.png", "bad.wav", "bad.mp4"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    return tmp_path


def written(folder: Path, *records: Any, lines: bool = True) -> Path:
    file = folder / "data"
    parts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("\n".join(parts) if lines else f"[{','.join(parts)}]", encoding="utf-8")
    return file


def found(report: Any) -> list[tuple[str, str, int, int, str]]:
    return [(f.what, f.fault, f.count, f.record, f.id) for f in report.problems]


def test_clean_files_of_both_formats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media = [
        {"type": "image", "path": "good.png"},
        {"type": "audio", "path": "good.wav"},
        {"type": "video", "path": "good.mp4", "sound_track": True},
    ]
    assert cli.main(["check-data", str(written(folder, ours(*media), {"text": "Plain."}))]) == 0
    assert "2 records; media: 1 image, 1 video, 2 audio\nNo problems." in capsys.readouterr().out
    original = theirs(
        "<image><audio><video>", image="/x/good.png", voice="good.wav", video=["good.png", "/y/good.png"]
    )
    assert cli.main(["check-data", str(written(folder, original, lines=False)), "--media-root", str(folder)]) == 0
    assert "1 records in LLaVA's form; media: 1 image, 1 video, 1 audio\nNo" in capsys.readouterr().out


def test_files_of_several_images_and_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(
        folder,
        theirs("First <image>, second <image>?", image=["good.png", "good.png"], id=1),
        theirs("Look at this <image> now.", image="good.png", id="000000033471"),
        theirs("Two primes?", id=3),
        theirs("Two primes?", image=None),
        theirs("What is an <image>?", id=4),
        theirs("<image> <image>", image="good.png", id=5),
        lines=False,
    )
    assert cli.main(["check-data", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "6 records in LLaVA's form; media: 3 image, 0 video, 0 audio\n" in printed
    assert "2 <image> for 1 under 'image'; every medium needs one placeholder" in printed
    assert "note: a placeholder in a record without media stays text: 1 records, first: record 5 (id 4)" in printed


def test_every_kind_of_problem_in_our_format(folder: Path) -> None:
    report = check_data(
        written(
            folder,
            ours({"type": "image", "path": "good.png"}),
            ours({"type": "image", "path": "gone.png"}, id="first"),
            ours({"type": "image", "path": "gone.png"}),
            ours({"type": "image", "path": "bad.png"}),
            ours({"type": "audio", "path": "bad.wav"}),
            ours({"type": "video", "path": "bad.mp4"}, id="film"),
            ours({"type": "video", "path": "silent.mp4", "sound_track": True}),
            ours({"type": "smell", "path": "x"}, id="odd"),
            {"messages": []},
            ours({"type": "image", "image": {"a": 1}}),
            "{",
            "[1]",
        )
    )
    assert found(report) == [
        ("image", "missing", 2, 2, "first"),
        ("image", "unreadable", 2, 4, ""),
        ("audio", "unreadable", 2, 5, ""),
        ("video", "unreadable", 1, 6, "film"),
        ("record", "inconsistent", 3, 8, "odd"),
        ("record", "unreadable", 1, 11, ""),
    ]
    assert report.records == 12
    assert not report.original


def test_every_kind_of_problem_in_theirs(folder: Path) -> None:
    report = check_data(
        written(
            folder,
            theirs("<image><image>", image="good.png", id="two"),
            theirs("<video>", video=["good.png", "gone.png"], id="frames"),
            theirs("<video>", video=["good.png", "bad.png"]),
            theirs("Listen.", voice=["good.wav"], id="deaf"),
            theirs("Listen.", voice=["good.wav"]),
            theirs("Q", id=5) | {"conversations": [{"from": "human", "value": "Q"}]},
            lines=False,
        )
    )
    assert found(report) == [
        ("record", "inconsistent", 2, 1, "two"),
        ("video", "missing", 1, 2, "frames"),
        ("video", "unreadable", 1, 3, ""),
    ]
    assert [(r.what, r.count, r.id) for r in report.remarks] == [
        ("voice without <audio>: placed before the first question", 2, "deaf")
    ]
    assert "2 <image> for 1 under 'image'" in report.problems[0].detail
    assert report.original


def test_all_lists_every_case_and_ids_that_come_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = {"type": "image", "path": "gone.png"}
    file = written(folder, ours(gone, id="a"), ours(id="b"), ours(gone, id="a"), ours(), ours(), ours(id="b"))
    assert cli.main(["check-data", str(file)]) == 1
    short = capsys.readouterr().out
    assert "image missing               2   first: record 1 (id a): " in short
    assert "note: the id of an earlier record: 2 records, first: record 3 (id a)\n" in short
    assert "all of them" in short
    assert cli.main(["check-data", str(file), "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "  record 1 (id a)",
        "  record 3 (id a)",
        "  record 3 (id a)",
        "  record 6 (id b)",
        "2 problems.",
    ]
    assert lines[1].endswith("gone.png")
    assert "note" in lines[2]
    assert "image missing" in lines[3]


def test_the_command_prints_them_and_exits_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(folder, ours({"type": "image", "path": "gone\u001b[31m.png"}, id="x\u0007"), ours())
    assert cli.main(["check-data", str(file)]) == 1
    out = capsys.readouterr().out
    assert "image missing               1   first: record 1 (id x\\x07): " in out
    assert "\u001b" not in out
    assert out.endswith("1 problems.\n")
    assert cli.main(["check-data", str(written(folder, ours(), "{")), "--limit", "1"]) == 0


def test_files_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-data", str(folder / "none.json")]) == 2
    assert cli.main(["check-data", str(written(folder, ours())), "--media-root", str(folder / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert cli.main(["check-data", str(written(folder))]) == 1
    assert "not a single record" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["check-data", "x", "--limit", "0"])


def test_nothing_outside_of_the_media_root_is_opened(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes(tiny_media.encoded_picture())
    inside = folder / "media"
    inside.mkdir()
    (inside / "link.png").symlink_to(outside)
    report = check_data(
        written(folder, ours({"type": "image", "path": str(outside)}), ours({"type": "image", "path": "link.png"})),
        media_root=inside,
    )
    assert found(report) == [("image", "unreadable", 2, 1, "")]
    assert "outside of media_root" in report.problems[0].detail


def test_a_medium_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(module, "load_image", lambda value, policy: opened.append(value))
    check_data(written(folder, *[ours({"type": "image", "path": "good.png"})] * 5))
    assert opened == [str(folder / "good.png")]


def test_a_bar_only_for_long_checks(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    check_data(written(folder, ours()))
    assert "Checking" not in capsys.readouterr().err
    monkeypatch.setattr(module, "_SECONDS_BEFORE_A_BAR", 0)
    check_data(written(folder, ours()))
    assert "Checking" in capsys.readouterr().err
