"""Adapters of all tasks as one: images in, everything that was seen in them out."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image

from .interface import Detector, Images, Reader, Relator, Segmenter
from .replay import PIXELS, pixel_digest
from .results import Perception

# The size that MoAI shows all its vision models, whatever the shape of the photo.
ORIGINAL_SIDE = 490
_TASKS = ("segmenter", "detector", "relator", "reader")


@dataclass(frozen=True)
class Perceiver:
    """Looks at images with an adapter per task; None skips the task.

    Fields:
        stretch_to: images are stretched to squares of this side first, as the original does with 490; None keeps their
            shape, which reads small text better.
        max_side: larger images are made smaller until their longer side has so many pixels.
    """

    segmenter: Segmenter | None = None
    detector: Detector | None = None
    relator: Relator | None = None
    reader: Reader | None = None
    stretch_to: int | None = None
    max_side: int = 1280

    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on besides the images, as JSON."""
        adapters = {task: getattr(self, task) for task in _TASKS}
        found = {task: adapter.identity() for task, adapter in adapters.items() if adapter is not None}
        return {**found, "stretch_to": self.stretch_to, "max_side": self.max_side}

    def digest(self) -> str:
        """A name of `identity`: results under one name may be mixed."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def perceive(self, images: Images) -> list[Perception]:
        """What every task finds in every image, in pixels of the image after `prepared`."""
        images = [self.prepared(image) for image in images]
        seen = [Perception(*image.size) for image in images]
        if not images:
            return seen
        if self.segmenter is not None:
            seen = _with(seen, "segmentation", self.segmenter.segment(images))
        if self.detector is not None:
            seen = _with(seen, "boxes", self.detector.detect(images))
        if self.relator is not None:
            seen = _with(seen, "scene_graph", self.relator.relate(images, seen))
        if self.reader is not None:
            seen = _with(seen, "lines", self.reader.read(images))
        return seen

    def prepared(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The RGB image as the adapters see it."""
        image = image.convert("RGB")
        size = self._size(image.size)
        if size == image.size:
            return image
        resized = image.resize(size, PIL.Image.Resampling.BILINEAR)
        resized.info[PIXELS] = pixel_digest(image)
        return resized

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.stretch_to is not None:
            return self.stretch_to, self.stretch_to
        share = min(1.0, self.max_side / max(size))
        return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def _with(seen: Sequence[Perception], part: str, found: Sequence[Any]) -> list[Perception]:
    return [replace(one, **{part: result}) for one, result in zip(seen, found, strict=True)]
