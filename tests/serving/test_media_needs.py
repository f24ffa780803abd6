"""What long media will take is said before they are decoded, and is what they take."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_media
import tiny_training
import torch

from unimoe.commands import chat
from unimoe.errors import RequestError, UniMoeError
from unimoe.processing import media_audio_unimoe
from unimoe.serving import media_needs
from unimoe.serving.answering import Answerer
from unimoe.serving.tracked_memory import peak_bytes

CONTEXT = 8192
MINUTES = 10.5


@pytest.fixture(scope="module")
def answer() -> Answerer:
    """Windows of 1 s, each 3 tokens of speech and 2 of sound; videos 4 tokens."""
    processor = tiny_training.processor()
    model = tiny_training.model(processor, sparse=True, max_position_embeddings=CONTEXT)
    return Answerer(model, processor, {"max_new_tokens": 4, "do_sample": False})


@pytest.fixture(scope="module")
def long_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("long")
    (folder / "long.wav").write_bytes(tiny_media.wav(np.resize(tiny_media.sound(1.0), round(MINUTES * 60 * 16_000))))
    (folder / "loud.mp4").write_bytes(tiny_media.video(frames=60, track=True))
    (folder / "mute.mp4").write_bytes(tiny_media.video(frames=60))
    return {file.stem: str(file) for file in folder.iterdir()}


def question(*media: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*media, {"type": "text", "text": "What is it?"}]}]


def tokens_of(answer: Answerer, messages: list[dict[str, Any]]) -> int:
    inputs = answer.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, load_audio_from_video=True
    )
    return len(inputs["input_ids"][0])


def test_ten_minutes_are_said_first_and_answered(answer: Answerer, long_files: dict[str, str], capsys: Any) -> None:
    conversation = chat.Conversation(answer, plan=answer.needs)
    conversation.attach("speech", long_files["long"])
    conversation.say("What is said?")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "windows" in line]
    assert line.startswith("10.5 min of speech: 630 windows, 1,890 tokens; 1,9")
    assert "with the text, about " in line
    assert conversation.last is not None
    assert f"{conversation.last.prompt_tokens:,} tokens with the text" in line


@pytest.mark.parametrize(
    ("kind", "clips"),
    [
        ("audio", ["10.5 min of audio: 630 windows, 3,150 tokens"]),
        ("sound", ["10.5 min of sound: 630 windows, 1,260 tokens"]),
    ],
)
def test_branches_are_counted_apart(
    answer: Answerer, long_files: dict[str, str], kind: str, clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_audio_unimoe, "load_audio", None)  # nothing may be decoded
    needs = answer.needs(question({**chat._MEDIA[kind], "path": long_files["long"]}))
    assert list(map(str, needs.clips)) == clips


@pytest.mark.parametrize(
    ("kind", "file", "names"),
    [
        ("video", "loud", ["audio", "video"]),
        ("video", "mute", ["video"]),
        ("silent-video", "loud", ["video"]),
        ("video-with-sound", "loud", ["audio", "video"]),
    ],
)
def test_videos_are_heard_unless_they_are_not_to_be(
    answer: Answerer, long_files: dict[str, str], kind: str, file: str, names: list[str]
) -> None:
    messages = question({**chat._MEDIA[kind], "path": long_files[file]})
    needs = answer.needs(messages)
    assert [clip.name for clip in needs.clips] == names
    assert needs.tokens == tokens_of(answer, messages) == answer(messages, lambda piece: None).prompt_tokens


def test_tokens_are_those_of_the_prompt(answer: Answerer) -> None:
    mixed = question(
        {"type": "image", "image": tiny_media.picture()},
        {"type": "audio", "audio": tiny_media.sound(2.5)},
        {"type": "audio", "audio": tiny_media.wav(tiny_media.sound(0.4, rate=8_000), rate=8_000)},
        {"type": "video", "video": tiny_media.video(frames=5, track=True)},
    )
    conversation = [*mixed, {"role": "assistant", "content": "A cat <image>."}, *question()]
    assert answer.needs(conversation).tokens == tokens_of(answer, conversation)


def test_what_exceeds_the_context_is_refused_with_the_arithmetic(
    answer: Answerer, long_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer.model.config.text_config, "max_position_embeddings", 3000)
    audio = question({"type": "audio", "path": long_files["long"]})
    with pytest.raises(
        RequestError, match=r"630 windows, 3,150 tokens; 3,1\d\d tokens with .* fewer than 3,000\. Give"
    ):
        answer(audio, lambda piece: None)


def test_what_exceeds_the_memory_is_refused_with_the_arithmetic(
    answer: Answerer, long_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_needs, "free_memory", lambda device: 30_000_000)
    audio = question({"type": "audio", "path": long_files["long"]})
    with pytest.raises(UniMoeError, match=r"10\.5 min of audio.*: \d\.\d GB are needed where 30 MB are free on cpu"):
        answer(audio, lambda piece: None)
    answer(question(), lambda piece: None)


def test_towers_hear_four_minutes_at_once(answer: Answerer) -> None:
    encode = answer.model.model.encode_speech

    def peak(windows: int) -> int:
        return peak_bytes(lambda: encode(torch.empty(windows, 80, 100)))

    # Beyond four minutes (240 windows of 1 s) only windows and states grow, and states are there twice when joined.
    assert peak(720) - peak(480) <= 240 * 4 * (80 * 100 + 2 * 50 * 32)
    assert peak(240) > 1.9 * peak(120)
    windows = torch.randn(500, 80, 100)
    with torch.no_grad():
        own = answer.model.model.encode_speech(windows)
        torch.testing.assert_close(own[480:], answer.model.model.encode_speech(windows[480:]))
        torch.testing.assert_close(own[230:250], answer.model.model.encode_speech(windows[230:250]))


@pytest.mark.parametrize(
    ("compute", "peak"),
    [
        (lambda: torch.empty(1000) + 1, 8000),
        (lambda: torch.empty(1000).add_(1), 4000),
        (lambda: torch.empty(1000).view(10, 100)[2], 4000),
        (lambda: [torch.empty(1000) for _ in range(5)], 20_000),
        (lambda: [torch.empty(1000).sum() for _ in range(5)], 4000 + 20),
    ],
)
def test_peaks_are_counted_without_computing(compute: Callable[[], Any], peak: int) -> None:
    assert peak_bytes(compute) == pytest.approx(peak, abs=40)


def test_damaged_files_are_refused_before_anything_else(answer: Answerer, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF....WAVEfmt nonsense")
    (tmp_path / "bad.mp4").write_bytes(b"....ftyp nonsense")
    for kind, name in (("audio", "bad.wav"), ("video", "bad.mp4"), ("audio", "missing.wav")):
        with pytest.raises(UniMoeError, match=kind):
            answer.needs(question({"type": kind, "path": str(tmp_path / name)}))


SCRIPT = """
import sys
from pathlib import Path
from unimoe.serving.freed_memory import give_back_freed_memory

def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) // 1024

if sys.argv[1] == "give":
    give_back_freed_memory()
del [bytearray(b"x" * (30 << 20))][0]  # from here on glibc keeps blocks of up to this size
before = anonymous()
blocks = [bytearray(b"x" * (2 << 20)) for _ in range(64)]
blocks = blocks[1::2]
print(anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own")
def test_freed_blocks_are_given_back() -> None:
    kept = {
        choice: int(subprocess.check_output([sys.executable, "-c", SCRIPT, choice], text=True))
        for choice in ("give", "keep")
    }
    assert kept["give"] < 72 < 110 < kept["keep"]
