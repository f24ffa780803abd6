"""Pictures of signs with a word each, and the question what they say: data that only somebody who can read answers.

Words of the held-out split occur in no picture to learn from. Fonts are those in matplotlib's wheel (DejaVu, STIX and
Computer Modern), which are free to use. Everything follows from the seed.

    python -m unimoe.quickstart.sign_data --out signs
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import PIL.ImageFont

from ..errors import DataError, MediaError, MissingPackageError
from ..processing.media_unimoe import load_image

QUESTION = "What does the sign say?"
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmss10",
)
_WORDS = (
    "airport apple arrow autumn avenue bakery balloon banana bank barber basket beach bicycle bistro blossom boat book "
    "bottle bread bridge brush bus butcher butter button cabin cable cafe camera candle canyon captain carpet castle "
    "cellar cheese cherry chicken chimney church cinema circle circus clinic clock closed cloud coast coffee college "
    "copper corner cotton court cream crystal curtain customs dairy dance danger dentist desert diner doctor dolphin "
    "dragon drink eagle east elevator engine entrance escape exit express factory falcon farm ferry festival flower "
    "forest fountain fresh fruit gallery garage garden gate giant ginger glass gold grand grill grocer guest hammer "
    "harbor harvest helmet hidden highway holiday honey horse hospital hotel house island jacket jewel journey jungle "
    "kettle kitchen ladder lake lantern laundry lemon library lobby lobster lucky lunch magic mango maple marble market "
    "meadow melon metro midnight milk mirror monkey morning motel mountain museum music mustard north notice oasis ocean "
    "office olive onion open orange orchard organic oyster palace panda paper parking parrot pasta pepper pharmacy piano "
    "pigeon pilot planet platform plaza police pottery private public pumpkin quarter queen rabbit radio railway ramp "
    "ranger recycle repair rescue ribbon river rocket royal saddle sailor salad salon school scissors shelter shoes "
    "silver slow smoke soup south spice spring square stable stadium station stone stop storm street studio sugar summer "
    "sunset sushi swim taxi tailor temple tennis theater thunder ticket tiger timber tomato tower toys tractor train "
    "tulip tunnel turtle umbrella valley vanilla velvet village vinegar violin wagon waffle walnut water welcome west "
    "whale wheat willow window winter wolf wood yellow yield zebra zoo"
)
WORDS = tuple(_WORDS.split())
_CONTRAST = 90  # of 255, between the brightness of a word and of what is behind it


@dataclass(frozen=True)
class SignOptions:
    """How many pictures of which kind.

    Fields: `size` of a picture in pixels; pictures of each split; share of the words that are held out; largest rotation
    in degrees; share of the picture's width that a word takes, at least and at most; all words, in lower case; how they
    may be written, as names of `str`'s methods.
    """

    size: int = 224
    train: int = 800
    heldout: int = 160
    heldout_words: float = 0.25
    rotation: float = 12.0
    width: tuple[float, float] = (0.35, 0.8)
    words: tuple[str, ...] = WORDS
    cases: tuple[str, ...] = ("upper", "title", "lower")
    seed: int = 0


def build_signs(out: str | Path, options: SignOptions = SignOptions()) -> dict[str, Path]:
    """Write pictures and `train.jsonl`, `heldout.jsonl`; returns the data file of each split.

    Raises:
        DataError: `out` is there already and holds something else.
        MissingPackageError: matplotlib, whose fonts are used, is not installed.
    """
    out = Path(out)
    if out.is_dir() and any(path.name not in ("images", "train.jsonl", "heldout.jsonl") for path in out.iterdir()):
        raise DataError(f"{out} holds other files: name a new folder.")
    (out / "images").mkdir(parents=True, exist_ok=True)
    fonts, files = font_files(), {}
    for split, words in split_words(options).items():
        count = options.train if split == "train" else options.heldout
        files[split] = out / f"{split}.jsonl"
        records = list(_records(out, split, words, count, fonts, options))
        files[split].write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return files


def split_words(options: SignOptions = SignOptions()) -> dict[str, list[str]]:
    """The words of each split; none is in both."""
    shuffled = np.random.default_rng([options.seed, 1]).permutation(options.words).tolist()
    held_out = round(options.heldout_words * len(shuffled))
    return {"train": shuffled[held_out:], "heldout": shuffled[:held_out]}


def font_files() -> dict[str, Path]:
    """The fonts, by name. Raises MissingPackageError: matplotlib is not installed."""
    try:
        from matplotlib import get_data_path
    except ImportError:
        raise MissingPackageError(
            "Signs are drawn with matplotlib's fonts: pip install 'unimoe[quickstart]'."
        ) from None
    folder = Path(get_data_path()) / "fonts" / "ttf"
    found = {name: folder / f"{name}.ttf" for name in FONTS}
    return {name: file for name, file in found.items() if file.is_file()}


def draw_sign(text: str, font: Path, options: SignOptions, rng: np.random.Generator) -> PIL.Image.Image:
    """A picture of a sign with a text, on some background."""
    side = options.size
    ground, behind, ink = _colours(rng)
    picture = _background(side, ground, rng)
    layer = PIL.Image.new("RGBA", (side, side), (*behind, 0))
    draw = PIL.ImageDraw.Draw(layer)
    face = _fitting(text, font, side * rng.uniform(*options.width), side)
    left, top, right, bottom = draw.textbbox((side / 2, side / 2), text, font=face, anchor="mm")
    margin = max(4.0, 0.3 * (bottom - top))
    board = (left - margin, top - margin, right + margin, bottom + margin)
    shape = rng.integers(3)
    if shape == 0:
        draw.rectangle(board, fill=(*behind, 255), outline=(*ink, 255), width=int(rng.integers(0, 4)))
    elif shape == 1:
        draw.rounded_rectangle(board, radius=margin, fill=(*behind, 255), outline=(*ink, 255), width=2)
    else:
        draw.rectangle((-side, board[1], 2 * side, board[3]), fill=(*behind, 255))
    draw.text((side / 2, side / 2), text, font=face, fill=(*ink, 255), anchor="mm")
    layer = layer.rotate(rng.uniform(-options.rotation, options.rotation), PIL.Image.Resampling.BICUBIC)
    room = [max(0.0, side - size) / 2 * 0.8 for size in (board[2] - board[0], 2 * (board[3] - board[1]))]
    moved = [int(rng.uniform(-free, free)) for free in room]
    picture.paste(layer, (moved[0], moved[1]), layer)
    if rng.random() < 0.4:
        picture = picture.filter(PIL.ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    noise = rng.normal(0, rng.uniform(0, 8), (side, side, 3))
    return PIL.Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


def _records(
    out: Path, split: str, words: list[str], count: int, fonts: dict[str, Path], options: SignOptions
) -> Iterator[dict[str, Any]]:
    for number in range(count):
        rng = np.random.default_rng([options.seed, split == "train", number])
        word = words[number % len(words)]
        text = getattr(word, options.cases[int(rng.integers(len(options.cases)))])()
        font = str(rng.choice(sorted(fonts)))
        name = f"images/{split}-{number:05d}.png"
        _save_sign(out / name, text, fonts[font], options, rng)
        question = [{"type": "image", "path": name}, {"type": "text", "text": QUESTION}]
        yield {
            "id": f"{split}-{number:05d}",
            "modality": "image",
            "task": "sign",
            "split": split,
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [{"type": "text", "text": text}]},
            ],
            "source": {"word": word, "font": font},
        }


def _save_sign(file: Path, text: str, font: Path, options: SignOptions, rng: np.random.Generator) -> None:
    """Draw until the file can be opened again: noise may look like the end of a ZIP archive, which is refused in images."""
    while True:
        draw_sign(text, font, options, rng).save(file)
        try:
            load_image(str(file))
        except MediaError:
            continue
        return


def _fitting(text: str, font: Path, width: float, side: int) -> PIL.ImageFont.FreeTypeFont:
    """The font at the size that makes a text so wide, within what can be read and what fits."""
    wide = PIL.ImageFont.truetype(str(font), 100).getlength(text)
    return PIL.ImageFont.truetype(str(font), int(np.clip(100 * width / wide, 16, side / 4)))


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the background, of the board, and of the word, which can be told from the board."""
    while True:
        ground, behind, ink = (tuple(rng.integers(0, 256, 3).tolist()) for _ in range(3))
        if abs(_brightness(behind) - _brightness(ink)) >= _CONTRAST:
            return ground, behind, ink


def _brightness(colour: tuple[int, ...]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _background(side: int, colour: tuple[int, ...], rng: np.random.Generator) -> PIL.Image.Image:
    """Plain, a gradient, stripes or blurred patches."""
    other = rng.integers(0, 256, 3)
    kind = rng.integers(4)
    mix: np.ndarray = np.zeros((side, side))
    if kind == 1:
        mix = np.add.outer(*np.linspace(0, 0.5, side)[None].repeat(2, 0))
    elif kind == 2:
        mix = 0.3 * (np.arange(side) // int(rng.integers(8, 40)) % 2)[None].repeat(side, 0)
    elif kind == 3:
        patches = PIL.Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        mix = np.asarray(patches.resize((side, side), PIL.Image.Resampling.BICUBIC)) / 255
    mixed = (1 - mix[..., None]) * np.array(colour) + mix[..., None] * other
    return PIL.Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw signs with words, to learn and to be asked what they say.")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=SignOptions.train, metavar="N", help="pictures to learn from")
    parser.add_argument(
        "--heldout", type=int, default=SignOptions.heldout, metavar="N", help="pictures of other words"
    )
    parser.add_argument("--size", type=int, default=SignOptions.size, metavar="PX", help="side of a picture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = SignOptions(size=args.size, train=args.train, heldout=args.heldout, seed=args.seed)
    for split, file in build_signs(args.out, options).items():
        print(f"{split}: {file}")


if __name__ == "__main__":
    main()
