"""A segmentation as the picture that MoAI's vision tower sees beside the photo."""

import colorsys
import zlib

import numpy as np
import PIL.Image

from ...package_errors import DataError
from .class_names import clean_name
from .results import Segmentation

# Rows of the original's colour table: COCO's 133 classes and one for nothing.
ORIGINAL_ROWS = 134
_BITS = 8
# Classes that everybody knows by a colour; others get one by their name.
_NATURAL = {
    "sky": (120, 180, 235),
    "grass": (95, 170, 70),
    "tree": (40, 115, 55),
    "water": (45, 115, 190),
    "sea": (35, 95, 170),
    "river": (60, 130, 200),
    "sand": (225, 200, 140),
    "snow": (235, 240, 250),
    "road": (120, 120, 130),
    "person": (220, 45, 75),
}


def bit_colours(rows: int = ORIGINAL_ROWS) -> np.ndarray:
    """PASCAL VOC's colour table, [rows, 3] uint8: bits 0, 1, 2 of a row's number are the highest bits of its red, green and
    blue, bits 3, 4, 5 the next ones."""
    numbers = np.arange(rows)[:, None] >> np.arange(3)[None]
    colours = np.zeros((rows, 3), dtype=np.int64)
    for step in range(_BITS):
        colours |= ((numbers >> 3 * step) & 1) << (_BITS - 1 - step)
    return colours.astype(np.uint8)


def original_picture(ids: np.ndarray) -> np.ndarray:
    """The original's picture of segment numbers: [..., 3] uint8, for ids [...].

    It shows numbers, not classes: the first segment of every image is dark red. Numbers below 0 are shown as 0.

    Raises:
        DataError: a number is above 133, for which the table has no row.
    """
    if ids.size and ids.max() >= ORIGINAL_ROWS:
        raise DataError(
            f"A segment has the number {ids.max()}; the original's colour table ends at {ORIGINAL_ROWS - 1}. Use class_map, or "
            "keep fewer segments."
        )
    return bit_colours()[np.maximum(ids, 0)]


def original_map(ids: np.ndarray) -> np.ndarray:
    """The same as the original feeds it: [..., 3] float64 in 0..1. It then normalises these values as if they were in
    0..255, which leaves next to nothing of the picture; that is for the processor, which has the normalisation."""
    return original_picture(ids) / 255


def class_map(segmentation: Segmentation) -> np.ndarray:
    """A picture of classes: [height, width, 3] uint8 in 0..255, to be normalised as photos are.

    A class has the same colour in every image, nothing is black, and segments of one class are parted by a black line.
    """
    ids = segmentation.ids
    picture = np.zeros((*ids.shape, 3), dtype=np.uint8)
    for segment in segmentation.segments:
        picture[ids == segment.id] = class_colour(segment.name)
    picture[_edges(ids)] = 0
    return picture


def class_colour(name: str) -> tuple[int, int, int]:
    """The colour of a class: bright enough to be told from black, by its clean name."""
    if (natural := _NATURAL.get(clean_name(name))) is not None:
        return natural
    number = zlib.crc32(clean_name(name).encode())
    hue, saturation, value = number % 360 / 360, 0.55 + number // 360 % 4 * 0.15, 0.7 + number // 1440 % 3 * 0.15
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def resized_ids(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of numbers at another (width, height), without numbers in between."""
    image = PIL.Image.fromarray(ids.astype(np.int32))
    return np.asarray(image.resize(size, PIL.Image.Resampling.NEAREST))


def _edges(ids: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour is of another segment."""
    edges = np.zeros(ids.shape, dtype=bool)
    edges[:, :-1] |= ids[:, 1:] != ids[:, :-1]
    edges[:-1] |= ids[1:] != ids[:-1]
    return edges & (ids > 0)
