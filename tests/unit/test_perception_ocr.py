"""Text is read by rapidocr's own models, for real, where the extra is installed."""

from importlib.util import find_spec
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pytest

from unimoe.errors import MissingPackageError, OptionError
from unimoe.processing.perception import ocr_rapidocr
from unimoe.processing.perception.ocr_rapidocr import RapidOcrReader
from unimoe.processing.perception.perceiver import Perceiver
from unimoe.processing.perception.verbalize import verbalize
from unimoe.quickstart.sign_data import SignOptions, build_signs, split_words
from unimoe.quickstart.sign_rates import reading_rate
from unimoe.trainers.caches.perceive_data import carry_out, data_samples, open_cache, plan_perception

needs_rapidocr = pytest.mark.skipif(
    find_spec("rapidocr") is None, reason="rapidocr is not installed: pip install 'unimoe[perception]'"
)


@pytest.fixture(scope="module")
def reader() -> RapidOcrReader:
    return RapidOcrReader(detection_side=320, threads=1)


def sign(*lines: str, size: tuple[int, int] = (320, 240), colour: str = "darkred") -> PIL.Image.Image:
    image = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((20, 30 + 80 * i), line, font=PIL.ImageFont.load_default(36), fill=colour)
    return image


@needs_rapidocr
def test_lines_are_read_in_order_and_in_their_place(reader: RapidOcrReader) -> None:
    images = [sign("EXIT 12", "Bakery Street"), sign(), sign("STOP", size=(160, 120))]
    seen = Perceiver(reader=reader).perceive(images)
    assert [verbalize(one) for one in seen] == [
        "The image includes text descriptions: EXIT 12, and Bakery Street.",
        "",
        "The image includes text descriptions: STOP.",
    ]
    for x, y in seen[0].lines[1].corners:
        assert 10 <= x <= 300
        assert 100 <= y <= 170


@needs_rapidocr
def test_limits_and_thresholds_hold(reader: RapidOcrReader) -> None:
    limited = RapidOcrReader(max_lines=1, max_characters=4, detection_side=320, threads=1)
    limited._engine = reader._loaded()
    (lines,) = limited.read([sign("Bakery Street", "EXIT 12")])
    assert len(lines) == 1
    assert len(lines[0].text) == 4
    limited.min_score = 1.1
    assert limited.read([sign("STOP")]) == [()]


@needs_rapidocr
def test_blue_and_red_are_not_swapped_but_on_demand(reader: RapidOcrReader) -> None:
    image = PIL.Image.new("RGB", (2, 2), (255, 0, 0))
    assert reader._array(image)[0, 0].tolist() == [0, 0, 255]
    assert RapidOcrReader(legacy=True)._array(image)[0, 0].tolist() == [255, 0, 0]


@needs_rapidocr
def test_signs_are_read_from_a_cache(reader: RapidOcrReader, tmp_path: Path) -> None:
    """Generated signs, perceived, cached and compared with what they say."""
    files = build_signs(tmp_path / "signs", SignOptions(size=160, train=4, heldout=2, rotation=3))
    samples, perceiver = data_samples(list(files.values())), Perceiver(reader=reader)
    cache = open_cache(tmp_path / "seen", perceiver)
    carry_out(plan_perception(samples, cache), perceiver, cache, progress=False)
    rate = reading_rate(samples, cache)
    assert rate.signs == 6
    assert rate.exact <= rate.ignoring_case
    assert rate.ignoring_case >= 4, rate


def test_signs_follow_from_the_seed_and_held_out_words_are_new(tmp_path: Path) -> None:
    words = split_words()
    assert not set(words["train"]) & set(words["heldout"])
    assert len(words["train"]) > 2 * len(words["heldout"]) > 60
    one, two = (tmp_path / name for name in "ab")
    for out in (one, two):
        build_signs(out, SignOptions(size=64, train=3, heldout=2))
    assert (one / "train.jsonl").read_text() == (two / "train.jsonl").read_text()
    pictures = sorted((one / "images").iterdir())
    assert len(pictures) == 5
    assert all(picture.read_bytes() == (two / "images" / picture.name).read_bytes() for picture in pictures)
    other = SignOptions(size=64, train=3, heldout=2, seed=1)
    build_signs(two, other)
    assert pictures[0].read_bytes() != (two / "images" / pictures[0].name).read_bytes()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr_rapidocr, "PACKAGE", "no-such-package")
    with pytest.raises(MissingPackageError, match=r"unimoe\[perception\]"):
        RapidOcrReader().read([sign()])
    with pytest.raises(OptionError, match="not on 'tpu'"):
        RapidOcrReader(device="tpu")
