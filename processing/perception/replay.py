"""Results that were found elsewhere, from a file: JSON lines, or a JSON list, of one record per image.

A record is what `Perception.to_json` gives, and says which image it is about, by "image", a path relative to the file's
folder, or by "pixels", the digest that `pixel_digest` gives. An adapter for every task.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ...package_errors import DataError
from ..media_policy_unimoe import MediaPolicy
from ..media_unimoe import load_image
from .colour_map import resized_ids
from .interface import Images
from .results import Bounds, Box, Perception, SceneGraph, Segmentation, TextLine

# Key in the `info` of an image that was resized: the digest of its pixels before.
PIXELS = "pixel_digest"


class Replay:
    """Gives what a file holds of an image; coordinates are scaled where it was looked at in another size.

    Args:
        file: JSON lines or a list.

    Raises:
        DataError: the file cannot be read, or a record is not of the form; an image that it does not hold, or holds without
            what is asked for, raises when it is asked for.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._known: dict[str, Perception] = {}
        text = self._text()
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        for number, record in enumerate(_records(text, self.file), 1):
            self._add(record, f"{self.file}, record {number}")

    def identity(self) -> dict[str, Any]:
        """The file's name and digest."""
        return {"adapter": "replay", "file": self.file.name, "digest": self._digest}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of a `Perceiver` that every record has results of."""
        parts = {"segmenter": "segmentation", "detector": "boxes", "relator": "scene_graph", "reader": "lines"}
        known = self._known.values()
        return tuple(t for t, part in parts.items() if all(getattr(one, part) is not None for one in known))

    def segment(self, images: Images) -> list[Segmentation]:
        return [self._of(image, "segmentation") for image in images]

    def detect(self, images: Images) -> list[tuple[Box, ...]]:
        return [self._of(image, "boxes") for image in images]

    def relate(self, images: Images, seen: Sequence[Perception]) -> list[SceneGraph]:
        return [self._of(image, "scene_graph") for image in images]

    def read(self, images: Images) -> list[tuple[TextLine, ...]]:
        return [self._of(image, "lines") for image in images]

    def _of(self, image: PIL.Image.Image, part: str) -> Any:
        digest = image.info.get(PIXELS) or pixel_digest(image)
        known = self._known.get(digest)
        found = None if known is None else getattr(scaled(known, *image.size), part)
        if found is None:
            what = "no record of the image" if known is None else f"no {part!r} in the record of the image"
            raise DataError(f"{self.file} has {what} with the pixels {digest}: add it, or use another adapter.")
        return found

    def _add(self, record: Any, place: str) -> None:
        if not isinstance(record, dict) or not ("pixels" in record or "image" in record):
            raise DataError(f"{place} must be a mapping with 'image' or 'pixels', and what was seen there.")
        perception = Perception.from_json(record, place)
        digest = record.get("pixels")
        if digest is None:
            image = load_image(str(record["image"]), MediaPolicy(media_root=str(self.file.parent)), place)
            digest = pixel_digest(image)
        self._known[digest] = perception

    def _text(self) -> str:
        try:
            return self.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.file} cannot be read ({error}): check path and encoding (UTF-8).") from error


def pixel_digest(image: PIL.Image.Image) -> str:
    """A name of an image's pixels: the same for all formats that keep them."""
    array = np.asarray(image.convert("RGB"))
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()[:32]


def scaled(seen: Perception, width: int, height: int) -> Perception:
    """The same in the pixels of an image of another size."""
    if (seen.width, seen.height) == (width, height):
        return seen
    x, y = width / seen.width, height / seen.height

    def moved(bounds: Bounds | None) -> Bounds | None:
        return None if bounds is None else (bounds[0] * x, bounds[1] * y, bounds[2] * x, bounds[3] * y)

    segmentation, graph = seen.segmentation, seen.scene_graph
    if segmentation is not None:
        segmentation = replace(segmentation, ids=resized_ids(segmentation.ids, (width, height)))
    if graph is not None:
        graph = replace(graph, objects=tuple(replace(one, bounds=moved(one.bounds)) for one in graph.objects))
    return Perception(
        width,
        height,
        segmentation,
        None if seen.boxes is None else tuple(replace(box, bounds=moved(box.bounds)) for box in seen.boxes),
        graph,
        None if seen.lines is None else tuple(_moved_line(line, x, y) for line in seen.lines),
    )


def _moved_line(line: TextLine, x: float, y: float) -> TextLine:
    return replace(line, corners=tuple((left * x, top * y) for left, top in line.corners))


def _records(text: str, file: Path) -> list[Any]:
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is neither JSON lines nor a JSON list ({error}).") from error
