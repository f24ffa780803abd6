"""What an adapter of each task offers. Results are lists as long as the images, in their order.

An adapter is cheap to make: its model is loaded when the first images come, and optional packages are imported then.
Any object with these methods will do; nothing needs to derive from them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import PIL.Image

from .results import Box, Perception, SceneGraph, Segmentation, TextLine

Images = Sequence[PIL.Image.Image]


class Adapter(Protocol):
    """What all adapters have."""

    def identity(self) -> dict[str, Any]:
        """What the results depend on, as JSON: the model, down to its weights, and the settings. Loads no model."""


class Segmenter(Adapter, Protocol):
    def segment(self, images: Images) -> list[Segmentation]:
        """A map per image, of the image's size."""


class Detector(Adapter, Protocol):
    def detect(self, images: Images) -> list[tuple[Box, ...]]:
        """Objects per image, in pixels of the image."""


class Relator(Adapter, Protocol):
    def relate(self, images: Images, seen: Sequence[Perception]) -> list[SceneGraph]:
        """A scene graph per image; `seen` holds the segments and boxes that were found in the images before."""


class Reader(Adapter, Protocol):
    def read(self, images: Images) -> list[tuple[TextLine, ...]]:
        """Lines of text per image, in reading order."""
