"""Relations between objects by rules about their boxes: a stand-in where no scene graph model is at hand.

A rule knows where things are in the picture, not what they do: "person is over horse" is all that it can say of a rider.
Graphs of it carry the source "rules", in JSON, in pictures and in plans. Its scores are no probabilities: they say how
well a rule fits, from 0.8, the least that is told, to 1.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .interface import Images
from .limits import best
from .results import Bounds, GraphObject, Perception, Relation, SceneGraph

SOURCE = "rules"
_VERSION = 1
# Shares of a box or of the image's side.
_INSIDE, _OVERLAP, _NEAR = 0.9, 0.5, 0.15
# Of the image: what is larger holds nothing, other things are in front of it.
_BACKDROP = 0.25


class SpatialRules:
    """Relates segments, or boxes where there are none, with five predicates of PSG: in, on, over, in front of, beside.

    Args:
        max_objects: the largest ones.
        max_relations: those of highest score.
        min_score: of a box for it to count as an object.
    """

    def __init__(self, max_objects: int = 20, max_relations: int = 20, min_score: float = 0.5) -> None:
        self.max_objects = max_objects
        self.max_relations = max_relations
        self.min_score = min_score

    def identity(self) -> dict[str, Any]:
        """Version of the rules, and limits."""
        limits = {"max_objects": self.max_objects, "max_relations": self.max_relations, "min_score": self.min_score}
        return {"adapter": "spatial rules", "version": _VERSION, **limits}

    def relate(self, images: Images, seen: Sequence[Perception]) -> list[SceneGraph]:
        """A graph per image, of what `seen` holds; the images are not looked at."""
        return [self._graph(perception) for perception in seen]

    def _graph(self, seen: Perception) -> SceneGraph:
        objects = best(self._objects(seen), lambda one: _area(one.bounds), self.max_objects)
        relations = list(_relations(objects, seen))
        return SceneGraph(objects, best(relations, lambda r: r.score, self.max_relations), SOURCE)

    def _objects(self, seen: Perception) -> list[GraphObject]:
        if seen.segmentation is not None:
            bounds = seen.segmentation.bounds()
            return [GraphObject(s.name, bounds[s.id]) for s in seen.segmentation.segments if s.id in bounds]
        return [GraphObject(box.name, box.bounds) for box in seen.boxes or () if box.score >= self.min_score]


def _relations(objects: Sequence[GraphObject], seen: Perception) -> Iterator[Relation]:
    """At most one relation per pair: the rule that fits best, in whichever direction."""
    for i in range(len(objects)):
        for k in range(i + 1, len(objects)):
            rated = [
                (score, subject, other, predicate)
                for subject, other in ((i, k), (k, i))
                for predicate, score in _rules(objects[subject].bounds, objects[other].bounds, seen)
            ]
            if rated:
                score, subject, other, predicate = max(rated, key=lambda fit: fit[0])
                yield Relation(subject, other, predicate, round(0.8 + 0.2 * min(score, 1.0), 4))


def _rules(one: Bounds, other: Bounds, seen: Perception) -> Iterator[tuple[str, float]]:
    """Predicates that hold of one box towards another, each with its fit in 0..1."""
    left, top, right, bottom = one
    left_2, top_2, right_2, bottom_2 = other
    shared = max(0.0, min(right, right_2) - max(left, left_2)), max(0.0, min(bottom, bottom_2) - max(top, top_2))
    narrow, low = min(right - left, right_2 - left_2), min(bottom - top, bottom_2 - top_2)
    if not narrow or not low:
        return
    across, along = shared[0] / narrow, shared[1] / low
    covered = shared[0] * shared[1] / _area(one)
    is_smaller, is_backdrop = _area(one) < _area(other), _area(other) > _BACKDROP * seen.width * seen.height
    if covered >= _INSIDE and _area(one) < _OVERLAP * _area(other):
        yield ("in front of" if is_backdrop else "in"), covered
    elif across >= _OVERLAP and is_smaller and top < top_2 <= bottom <= bottom_2:
        yield "on", across
    elif across >= _OVERLAP and bottom <= top_2 and top_2 - bottom <= _NEAR * seen.height:
        yield "over", across * 0.9
    elif covered >= 0.2 and bottom > bottom_2 + 0.02 * seen.height:
        yield "in front of", covered * 0.8
    gap = max(left, left_2) - min(right, right_2)
    if along >= _OVERLAP and 0 <= gap <= _NEAR * seen.width and left < left_2:
        yield "beside", along * (1 - gap / (_NEAR * seen.width)) * 0.8


def _area(bounds: Bounds) -> float:
    return max(0.0, bounds[2] - bounds[0]) * max(0.0, bounds[3] - bounds[1])
