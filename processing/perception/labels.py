"""Labels beside what they name: inside of the picture, and none on top of another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import PIL.ImageFont

from .results import Bounds

Colour = tuple[int, int, int]
_PADDING = 5
_ELLIPSIS = "…"
# Pillow looks for them where the system keeps its fonts: Linux, macOS, Windows.
_FONTS = ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf")
# Steps, in heights of a label, in which a place is looked for around a thing.
_FARTHEST = 40


@dataclass(frozen=True)
class Label:
    """A label in its place; `anchor` is a point of what it names where it lies away from it."""

    bounds: Bounds
    text: str
    colour: Colour
    anchor: tuple[float, float] | None = None


class LabelPlacer:
    """Finds places for labels in a picture of `size`, one after another."""

    def __init__(self, size: tuple[int, int], font: PIL.ImageFont.FreeTypeFont) -> None:
        self.font = font
        self._size = size
        self._taken: list[Bounds] = []

    def place(self, wanted: Sequence[tuple[Bounds, str, Colour]]) -> Iterator[Label]:
        """Labels of things, in order; one for which there is no room at all is left out."""
        for bounds, text, colour in wanted:
            text = self._shortened(text)
            width = self.font.getlength(text) + 2 * _PADDING
            height = sum(self.font.getmetrics()) + _PADDING
            for place, is_near in self._places(bounds, width, height):
                if not any(_touch(place, other) for other in self._taken):
                    self._taken.append(place)
                    yield Label(place, text, colour, None if is_near else self._inside(bounds))
                    break

    def _places(self, bounds: Bounds, width: float, height: float) -> Iterator[tuple[Bounds, bool]]:
        """Above, below and inside of a thing, then farther and farther away; and whether the place is at the thing."""
        left, top, right, bottom = bounds
        starts = (left, right - width, (left + right - width) / 2)
        for x in starts:
            yield self._moved_in(x, top - height, width, height), True
        for y in (bottom, top, bottom - height):
            for x in starts:
                yield self._moved_in(x, y, width, height), True
        for step in range(1, _FARTHEST):
            for x, y in ((left, top - (step + 1) * height), (left, bottom + step * height)):
                yield self._moved_in(x, y, width, height), False
            for x in (left - width - step * height, right + step * height):
                yield self._moved_in(x, top, width, height), False

    def _moved_in(self, x: float, y: float, width: float, height: float) -> Bounds:
        x = min(max(x, 0.0), max(0.0, self._size[0] - width - 1))
        y = min(max(y, 0.0), max(0.0, self._size[1] - height - 1))
        return x, y, x + width, y + height

    def _inside(self, bounds: Bounds) -> tuple[float, float]:
        x, y = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
        return min(max(x, 0.0), self._size[0] - 1.0), min(max(y, 0.0), self._size[1] - 1.0)

    def _shortened(self, text: str) -> str:
        """A text in one line that fits into the picture's width."""
        text = " ".join(text.split())
        room = self._size[0] - 2 * _PADDING - 2
        if self.font.getlength(text) <= room:
            return text
        while text and self.font.getlength(text + _ELLIPSIS) > room:
            text = text[:-1]
        return text + _ELLIPSIS


@lru_cache(maxsize=8)
def font_of(size: int) -> PIL.ImageFont.FreeTypeFont:
    """A font of this machine that has accents and signs; where there is none, the one in Pillow, which has Latin letters."""
    for name in _FONTS:
        try:
            return PIL.ImageFont.truetype(name, size)
        except OSError:
            continue
    return PIL.ImageFont.load_default(size)  # type: ignore[return-value]


def _touch(one: Bounds, other: Bounds) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
