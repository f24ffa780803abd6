"""Reading the starter corpus that lies built in this folder: samples, checksums and the picture augmentation.

Only Pillow and numpy are needed. Media stay files: a sample's paths are made absolute here, decoding is left to
whoever uses them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from ..errors import DataError

CHECKSUM_FILE = "checksums.sha256"
SHARE_ALIKE_FOLDER = "share_alike"
MEDIA_TYPES = ("image", "video", "audio")
SPLIT_FILES = {
    "train": ("train.jsonl",),
    "heldout": ("heldout.jsonl", f"{SHARE_ALIKE_FOLDER}/heldout.jsonl"),
    "stage0": ("stage0.jsonl",),
}
PICTURE_SIZE = 96
MINIMUM_CONTRAST = 0.25

Sample = dict[str, Any]


def corpus_root() -> Path:
    """The folder that holds the built corpus."""
    return Path(__file__).resolve().parent


def load_samples(split: str, modality: str | None = None, root: Path | None = None) -> list[Sample]:
    """Reads the samples of a split, with absolute media paths.

    Args:
        split: "train", "heldout" or "stage0". "stage0" rows are either {"text": ...} (plain English) or
            {"messages": ...} (questions about described media and plain text questions).
        modality: keep only samples of this modality ("image", "speech", "sound", "video", "text").
        root: folder of the corpus; `corpus_root()` by default.

    Raises:
        DataError: unknown split, missing file or a line that is not JSON.
    """
    if split not in SPLIT_FILES:
        raise DataError(f"split {split!r} does not exist in the starter corpus; use one of {sorted(SPLIT_FILES)}")
    root = corpus_root() if root is None else Path(root)
    samples = [sample for name in SPLIT_FILES[split] for sample in _read_lines(root / name)]
    if modality is None:
        return samples
    return [sample for sample in samples if sample.get("modality") == modality]


def _read_lines(path: Path) -> list[Sample]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing; the starter corpus is incomplete, check out the repository again"
        ) from error
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error.msg}); check out the file again") from error
        samples.append(_with_absolute_paths(sample, path.parent))
    return samples


def _with_absolute_paths(sample: Sample, folder: Path) -> Sample:
    for message in sample.get("messages", []):
        for item in message["content"]:
            if item["type"] in MEDIA_TYPES:
                item["path"] = str(folder / item["path"])
    return sample


def verify(root: Path | None = None) -> int:
    """Compares every file of the corpus with `checksums.sha256`.

    Returns:
        The number of files checked.

    Raises:
        DataError: a file is missing or damaged; the message names it.
    """
    root = corpus_root() if root is None else Path(root)
    checksums = root / CHECKSUM_FILE
    if not checksums.exists():
        raise DataError(f"{checksums} is missing; check out the repository again")
    lines = checksums.read_text(encoding="utf-8").splitlines()
    for line in lines:
        expected, name = line.split("  ", maxsplit=1)
        path = root / name
        if not path.exists():
            raise DataError(f"starter corpus file {name} is missing under {root}; check out the repository again")
        digest = file_digest(path)
        if digest != expected:
            raise DataError(
                f"starter corpus file {name} is damaged: SHA-256 {digest} instead of {expected}; "
                "check out the file again"
            )
    return len(lines)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compose_image(icon: Image.Image, rng: np.random.Generator, size: int = PICTURE_SIZE) -> Image.Image:
    """Puts a transparent icon somewhere on a random background, so that pixels alone do not give the label away.

    Scale (50-95 % of the picture), rotation (±20°), mirroring, place, colours and background are random; the
    background is drawn again until it differs in brightness from the icon.

    Args:
        icon: the drawing; converted to RGBA.
        rng: source of all randomness; the same state gives the same picture.
        size: width and height of the result in pixels.

    Returns:
        RGB picture of `size` x `size`.
    """
    icon = _jitter_colours(icon.convert("RGBA"), rng)
    if rng.random() < 0.5:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    icon = icon.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BICUBIC)
    side = max(1, round(size * float(rng.uniform(0.5, 0.95))))
    icon = icon.resize((side, side), Image.Resampling.BILINEAR)
    canvas = random_background(rng, size, avoid_brightness=mean_brightness(icon))
    left, top = (int(value) for value in rng.integers(0, size - side + 1, size=2))
    canvas.paste(icon, (left, top), icon)
    return canvas


def random_background(rng: np.random.Generator, size: int, avoid_brightness: float) -> Image.Image:
    """A plain colour or a linear colour gradient whose brightness is away from `avoid_brightness` (0 to 1)."""
    for _ in range(16):
        colours = rng.integers(0, 256, size=(2, 3)).astype(np.float32)
        if rng.random() < 0.5:
            colours[1] = colours[0]
        brightness = colours @ np.array([0.299, 0.587, 0.114], np.float32) / 255
        if np.abs(brightness - avoid_brightness).min() >= MINIMUM_CONTRAST:
            break
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    grid = np.broadcast_to(ramp, (size, size)) if rng.random() < 0.5 else np.broadcast_to(ramp[:, None], (size, size))
    pixels = colours[0] + grid[..., None] * (colours[1] - colours[0])
    return Image.fromarray(pixels.round().astype(np.uint8), "RGB")


def _jitter_colours(icon: Image.Image, rng: np.random.Generator) -> Image.Image:
    alpha = icon.getchannel("A")
    colour = icon.convert("RGB")
    saturation = 0.0 if rng.random() < 0.15 else float(rng.uniform(0.6, 1.3))
    colour = ImageEnhance.Color(colour).enhance(saturation)
    colour = ImageEnhance.Brightness(colour).enhance(float(rng.uniform(0.75, 1.15)))
    colour.putalpha(alpha)
    return colour


def mean_brightness(icon: Image.Image) -> float:
    """Mean brightness (0 to 1) of the opaque part of an RGBA picture."""
    pixels = np.asarray(icon, dtype=np.float32) / 255
    alpha = pixels[..., 3]
    brightness = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    return float((brightness * alpha).sum() / max(float(alpha.sum()), 1e-6))
