"""The sentences in which a language model reads what vision models saw; a pure function of their results.

The wording is MoAI's, whose released model was trained on it. `legacy=True` keeps the faults of the original's code too:

- segments: boxes are matched to names by position, so that an id without pixels shifts them, or empties the part;
- objects: boxes reach outside of 0..1 ("-0.00"), and one object found under several equal queries is told several times;
- relations: with fewer of them than min(10, objects) there is no part at all; what is told has the order that numpy
  1.26's partition leaves;
- text: no line is checked for being blank;
- empty parts leave their spaces.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .class_names import clean_name
from .original_order import largest_as_partitioned
from .results import Bounds, Box, Perception, Relation, SceneGraph, Segmentation, TextLine

OBJECTS = "The image includes bounding box coordinates and their objects: "
RELATIONS = "The image includes relationships between objects: "
TEXTS = "The image includes text descriptions: "
PARTS = ("segmentation", "detection", "scene_graph", "text")


@dataclass(frozen=True)
class Verbalization:
    """How results become text.

    Fields: `legacy` as in the module's description; least scores that are told; at most so many of each (None: all);
    `max_characters` of the whole text, from which the last items of the longest part are left out until it fits.
    """

    legacy: bool = False
    min_box_score: float = 0.5
    min_relation_score: float = 0.8
    min_line_score: float = 0.85
    max_segments: int | None = 50
    max_boxes: int | None = 50
    max_relations: int = 10
    max_lines: int | None = 50
    max_characters: int | None = 8000


DEFAULT = Verbalization()
ORIGINAL = replace(DEFAULT, legacy=True, max_segments=None, max_boxes=None, max_lines=None, max_characters=None)


def rules_for(processor: Any) -> Verbalization:
    """The words for a processor's model: one that sees maps as MoAI-7B does reads texts as it does."""
    return ORIGINAL if processor.aux_maps == "released" else DEFAULT


def verbalize(perception: Perception, rules: Verbalization = DEFAULT) -> str:
    """All parts of a perception as one text, which is empty when nothing was seen (under legacy rules: three spaces)."""
    return join_parts(verbalized_parts(perception, rules).values(), rules.legacy)


def verbalized_parts(perception: Perception, rules: Verbalization = DEFAULT) -> dict[str, str]:
    """The text of each of `PARTS`; empty for what was not found or not looked for."""
    size = (perception.width, perception.height)
    segmentation, graph = perception.segmentation, perception.scene_graph
    items = {
        "segmentation": [] if segmentation is None else segment_items(segmentation, size, rules),
        "detection": box_items(perception.boxes or (), size, rules),
        "scene_graph": [] if graph is None else relation_items(graph, rules),
        "text": line_items(perception.lines or (), rules),
    }
    if rules.max_characters is not None:
        _fit(items, rules)
    return {name: _sentence(name, found) for name, found in items.items()}


def join_parts(parts: Iterable[str], legacy: bool = False) -> str:
    """Parts joined by a space; empty ones too under legacy rules."""
    return " ".join(part for part in parts if part or legacy)


def segment_items(segmentation: Segmentation, size: tuple[int, int], rules: Verbalization = DEFAULT) -> list[str]:
    """The segments in their order, each as "[0.10, 0.20, 0.30, 0.40] name"; `size` is (width, height)."""
    bounds = segmentation.bounds()
    if rules.legacy:
        by_position = list(bounds.values())
        if len(by_position) < len(segmentation.segments):
            return []
        pairs = list(zip(segmentation.segments, by_position, strict=False))
    else:
        pairs = [(segment, bounds[segment.id]) for segment in segmentation.segments if segment.id in bounds]
    found = [f"{_coordinates(own, size, rules)} {clean_name(segment.name)}" for segment, own in pairs]
    return found[: rules.max_segments]


def box_items(boxes: Sequence[Box], size: tuple[int, int], rules: Verbalization = DEFAULT) -> list[str]:
    """The same of detected objects, those of high score only; names stay as they are."""
    found = [f"{_coordinates(b.bounds, size, rules)} {b.name}" for b in boxes if b.score >= rules.min_box_score]
    return (found if rules.legacy else list(dict.fromkeys(found)))[: rules.max_boxes]


def told_relations(graph: SceneGraph, rules: Verbalization = DEFAULT) -> list[Relation]:
    """The best relations, at most `max_relations` and as many as there are objects, in the order in which they are told."""
    scores = [relation.score for relation in graph.relations]
    wanted = min(rules.max_relations, len(graph.objects))
    if rules.legacy:
        chosen = largest_as_partitioned(scores, wanted) if 0 < wanted <= len(scores) else []
    else:
        chosen = sorted(range(len(scores)), key=lambda i: -scores[i])[:wanted]
    return [graph.relations[i] for i in chosen if scores[i] >= rules.min_relation_score]


def relation_items(graph: SceneGraph, rules: Verbalization = DEFAULT) -> list[str]:
    """The relations that are told, each as "person (#1) is on horse"."""
    names = numbered_names([one.name for one in graph.objects])
    told = told_relations(graph, rules)
    found = [f"{names[relation.subject]} is {relation.predicate} {names[relation.object]}" for relation in told]
    return found if rules.legacy else list(dict.fromkeys(found))


def line_items(lines: Sequence[TextLine], rules: Verbalization = DEFAULT) -> list[str]:
    """The texts of high score, in their order."""
    found = [line.text for line in lines if line.score >= rules.min_line_score]
    if not rules.legacy:
        found = [" ".join(text.split()) for text in found if text.strip()]
    return found[: rules.max_lines]


def numbered_names(names: Sequence[str]) -> list[str]:
    """Clean names; those that occur more than once get " (#1)", " (#2)" and so on in order."""
    clean = [clean_name(name) for name in names]
    total, seen, numbered = Counter(clean), Counter[str](), []
    for name in clean:
        seen[name] += 1
        numbered.append(f"{name} (#{seen[name]})" if total[name] > 1 else name)
    return numbered


def rounded(value: float) -> str:
    """Two decimals of the float32 nearest to a value, rounded as Python rounds the exact number."""
    return f"{round(float(np.float32(value)), 2):.2f}"


def _coordinates(bounds: Bounds, size: tuple[int, int], rules: Verbalization) -> str:
    shares = [float(np.float32(edge) / np.float32(size[i % 2])) for i, edge in enumerate(bounds)]
    if not rules.legacy:
        shares = [min(max(share, 0.0), 1.0) + 0.0 for share in shares]  # + 0.0: never -0.0
    return f"[{', '.join(map(rounded, shares))}]"


def _sentence(part: str, items: Sequence[str]) -> str:
    begin = {"scene_graph": RELATIONS, "text": TEXTS}.get(part, OBJECTS)
    return begin + ", and ".join(items) + "." if items else ""


def _fit(items: dict[str, list[str]], rules: Verbalization) -> None:
    """Take whole items from the ends of the longest parts until the text has its length."""
    while any(items.values()):
        texts = {name: _sentence(name, found) for name, found in items.items()}
        if len(join_parts(texts.values(), rules.legacy)) <= rules.max_characters:
            return
        longest = max(texts, key=lambda name: len(texts[name]))
        items[longest].pop()
