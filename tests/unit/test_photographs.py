"""Photographs from packages: how what is read counts, words that are cut out, and wheels of any platform."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_training

from unimoe.processing.perception.results import TextLine
from unimoe.quickstart import photographs, sign_reading
from unimoe.quickstart.photographs import PHOTOGRAPHS, WHEELS, Photograph, photographed_words, read_photographs
from unimoe.quickstart.sign_data import SignOptions
from unimoe.quickstart.sign_reading import SignCounts, draw_signs, sign_test
from unimoe.quickstart.wheels import wheel_target

LINES = ("MADRID", "cero", "no")


class Reads:
    """Reads the same in every picture."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def identity(self) -> dict[str, Any]:
        return {"adapter": "same"}

    def read(self, images: Any) -> list[tuple[TextLine, ...]]:
        return [tuple(TextLine(line, 0.9) for line in self.lines) for _ in images]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One picture, red but for a blue word."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[..., 0] = 255
    pixels[10:20, 30:70] = (0, 0, 255)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", (Photograph("a.png", "a", LINES, (("cero", (28, 8, 72, 22)),)),))
    return tmp_path


def test_the_most_alike_line_counts(folder: Path) -> None:
    (reading,) = read_photographs(folder, Reads("cero emisiones", "MADR1D", "xx"))
    assert (reading.characters, reading.read) == (12, ("cero emisiones", "MADR1D", "xx"))
    assert reading.right == pytest.approx(5 / 12)  # "cero" is nothing like a line of 14 characters
    assert read_photographs(folder, Reads(*LINES))[0].right == 1
    assert read_photographs(folder, Reads())[0].right == 0


def test_words_are_cut_out_and_asked_about(folder: Path) -> None:
    (sample,) = photographed_words(folder, folder / "words", 96)
    image, question = sample["messages"][0]["content"]
    assert question["text"] == "What does the sign say?"
    assert sample["messages"][1]["content"][0]["text"] == "cero"
    square = np.asarray(PIL.Image.open(image["path"]))
    assert square.shape == (96, 96, 3)
    assert square[48, 48].tolist() == [0, 0, 255]
    assert square[2, 2].tolist() == square[48, 2].tolist() == [255, 0, 0]
    assert 60 < (square[48, :, 2] > 128).sum() < 80


def test_a_comparison_may_ask_about_other_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sign_reading, "words_to_read", lambda _: ("exit", "gate", "inn", "door"))
    tokenizer, counts = tiny_training.processor().tokenizer, SignCounts(train=3, known=1, unseen=2)
    draw_signs(folder / "signs", tokenizer, counts, SignOptions(size=64))
    more = {"photographed words": photographed_words(folder, folder / "words", 64)}
    signs = sign_test(folder / "signs", folder / "seen", tokenizer, counts, Reads("cero"), more)
    (sample,) = signs.tests["photographed words"]
    assert sample["messages"][0]["content"][0]["aux"] == {"text": "The image includes text descriptions: cero."}
    assert list(signs.tests)[-1] == "photographed words"
    assert "cero" in signs.unseen_words


def test_the_table_of_photographs_is_whole() -> None:
    members = {Path(member).name for wheel in WHEELS for member in wheel.members}
    assert members == {photograph.file for photograph in PHOTOGRAPHS}
    for photograph in PHOTOGRAPHS:
        said = " ".join(photograph.lines)
        for word, (left, top, right, bottom) in photograph.words:
            assert word in said
            assert word == word.lower()
            assert left < right
            assert top < bottom


def test_wheels_of_other_platforms_can_be_fetched() -> None:
    assert wheel_target("a-1.0-py3-none-any.whl") == wheel_target("a-1.0-py2.py3-none-any.whl") == []
    options = wheel_target("a_b-1.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl")
    assert options == [
        *("--implementation", "cp", "--abi", "cp311", "--python-version", "3.11"),
        *("--platform", "manylinux_2_24_x86_64", "--platform", "manylinux_2_28_x86_64"),
    ]
