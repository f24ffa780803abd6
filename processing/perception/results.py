"""What vision models saw in an image, as plain data that becomes JSON and comes back the same.

Coordinates are pixels of the image that was looked at: x to the right, y down, from its upper left corner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...package_errors import DataError

# Left, top, right, bottom.
Bounds = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Segment:
    """One segment: its number in the map, the raw name and number of its class, and a score in 0..1."""

    id: int
    name: str
    score: float = 1.0
    label: int | None = None


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A panoptic segmentation: `ids` [height, width] int32 holds the segment of every pixel, 0 or less where none is."""

    ids: np.ndarray
    segments: tuple[Segment, ...]

    def bounds(self) -> dict[int, Bounds]:
        """The tight box of every segment number above 0 that has a pixel, in order; right and bottom are exclusive."""
        found = {}
        for number in np.unique(self.ids[self.ids > 0]).tolist():
            rows, columns = np.nonzero(self.ids == number)
            left, top = float(columns.min()), float(rows.min())
            found[int(number)] = (left, top, float(columns.max() + 1), float(rows.max() + 1))
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segmentation):
            return NotImplemented
        return self.segments == other.segments and np.array_equal(self.ids, other.ids)


@dataclass(frozen=True)
class Box:
    """A detected object. Bounds may lie outside of the image; detectors answer so."""

    name: str
    score: float
    bounds: Bounds


@dataclass(frozen=True)
class GraphObject:
    """What a relation relates: the raw name of its class, and its box where one is known."""

    name: str
    bounds: Bounds | None = None


@dataclass(frozen=True)
class Relation:
    """A statement "subject is predicate object": the numbers of two objects of the graph, from 0, and a score."""

    subject: int
    object: int
    predicate: str
    score: float = 1.0


@dataclass(frozen=True)
class SceneGraph:
    """Objects and their relations, in the order in which they were found; `source` says what found them."""

    objects: tuple[GraphObject, ...]
    relations: tuple[Relation, ...]
    source: str = "model"


@dataclass(frozen=True)
class TextLine:
    """A line of text in the image, with the corners around it where they are known."""

    text: str
    score: float
    corners: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Perception:
    """Everything that was seen in an image of `width` x `height`; None is for what nobody looked for."""

    width: int
    height: int
    segmentation: Segmentation | None = None
    boxes: tuple[Box, ...] | None = None
    scene_graph: SceneGraph | None = None
    lines: tuple[TextLine, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values; maps of segments as runs of equal numbers, row by row."""
        content: dict[str, Any] = {"width": self.width, "height": self.height}
        if self.segmentation is not None:
            segments = [[s.id, s.name, s.score, s.label] for s in self.segmentation.segments]
            shape = list(self.segmentation.ids.shape)
            content["segmentation"] = {
                "shape": shape, "runs": _runs(self.segmentation.ids), "segments": segments,
            }  # fmt: skip
        if self.boxes is not None:
            content["boxes"] = [[box.name, box.score, list(box.bounds)] for box in self.boxes]
        if self.scene_graph is not None:
            graph = self.scene_graph
            content["scene_graph"] = {
                "source": graph.source,
                "objects": [[one.name, None if one.bounds is None else list(one.bounds)] for one in graph.objects],
                "relations": [[r.subject, r.object, r.predicate, r.score] for r in graph.relations],
            }
        if self.lines is not None:
            content["lines"] = [[line.text, line.score, [list(c) for c in line.corners]] for line in self.lines]
        return content

    @classmethod
    def from_json(cls, content: Any, where: str = "perception") -> "Perception":
        """What `to_json` gave.

        Raises:
            DataError: it is not of this form; names `where`.
        """
        try:
            return _read(content)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{where} does not hold results of perception ({type(error).__name__}: {error}): remove it, and perceive "
                "the image again."
            ) from error


def _read(content: Mapping[str, Any]) -> Perception:
    boxes, lines = content.get("boxes"), content.get("lines")
    return Perception(
        width=_positive(content["width"]),
        height=_positive(content["height"]),
        segmentation=_read_segmentation(content.get("segmentation")),
        boxes=None if boxes is None else tuple(Box(str(n), float(s), _bounds(b)) for n, s, b in boxes),
        scene_graph=_read_graph(content.get("scene_graph")),
        lines=None if lines is None else tuple(TextLine(str(t), float(s), _corners(c)) for t, s, c in lines),
    )


def _read_segmentation(content: Mapping[str, Any] | None) -> Segmentation | None:
    if content is None:
        return None
    height, width = map(_positive, content["shape"])
    runs = np.asarray(content["runs"], dtype=np.int64).reshape(-1, 2)
    if (runs[:, 1] < 0).any() or runs[:, 1].sum() != height * width:
        raise ValueError(f"its runs do not fill {height} x {width} pixels")
    ids = np.repeat(runs[:, 0], runs[:, 1]).astype(np.int32).reshape(height, width)
    segments = (Segment(int(i), str(name), float(score), label) for i, name, score, label in content["segments"])
    return Segmentation(ids, tuple(segments))


def _read_graph(content: Mapping[str, Any] | None) -> SceneGraph | None:
    if content is None:
        return None
    objects = tuple(GraphObject(str(name), None if b is None else _bounds(b)) for name, b in content["objects"])
    relations = tuple(Relation(int(s), int(o), str(p), float(score)) for s, o, p, score in content["relations"])
    for relation in relations:
        if not (0 <= relation.subject < len(objects) and 0 <= relation.object < len(objects)):
            raise ValueError(f"a relation is of objects {relation.subject} and {relation.object} of {len(objects)}")
    return SceneGraph(objects, relations, str(content["source"]))


def _runs(ids: np.ndarray) -> list[int]:
    """[number, length, number, length, ...] of the flattened map."""
    flat = ids.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    lengths = np.diff(np.concatenate([starts, [flat.size]]))
    return np.stack([flat[starts], lengths], axis=1).reshape(-1).tolist()


def _bounds(values: Any) -> Bounds:
    left, top, right, bottom = map(float, values)
    return left, top, right, bottom


def _corners(values: Any) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in values)


def _positive(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(f"a size of {value} pixels")
    return int(value)
