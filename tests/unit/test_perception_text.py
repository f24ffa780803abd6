"""What a model reads of what was seen: sane by default, with the original's faults on demand; results as JSON and replay."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from unimoe.errors import DataError
from unimoe.processing.perception import class_names
from unimoe.processing.perception.auxiliary import with_aux
from unimoe.processing.perception.colour_map import class_colour, class_map, original_map
from unimoe.processing.perception.original_order import largest_as_partitioned
from unimoe.processing.perception.perceiver import Perceiver
from unimoe.processing.perception.replay import Replay, pixel_digest
from unimoe.processing.perception.results import (
    Box,
    GraphObject,
    Perception,
    Relation,
    SceneGraph,
    Segment,
    Segmentation,
    TextLine,
)
from unimoe.processing.perception.spatial_relations import SpatialRules
from unimoe.processing.perception.verbalize import DEFAULT, ORIGINAL, verbalize, verbalized_parts

OBJECTS = "The image includes bounding box coordinates and their objects: "


def segmentation() -> Segmentation:
    """Segment 1 lost all its pixels to segment 2."""
    ids = np.zeros((10, 20), dtype=np.int32)
    ids[:, :10], ids[5:, 10:] = 2, 3
    names = ("person", "sky-other-merged", "person")
    return Segmentation(ids, tuple(Segment(i, name, 0.9, i) for i, name in enumerate(names, 1)))


def everything() -> Perception:
    graph = SceneGraph(
        (GraphObject("person", (0, 0, 10, 10)), GraphObject("horse"), GraphObject("person")),
        (Relation(0, 1, "riding", 0.81), Relation(2, 1, "on", 0.95)),
        "psgtr",
    )
    lines = (TextLine(" STOP \n", 0.99, ((1, 2), (5, 2), (5, 4), (1, 4))), TextLine(" ", 0.99), TextLine("no", 0.2))
    boxes = (Box("car", 0.9, (-1, 0, 30, 5)), Box("car", 0.8, (-3, 0, 25, 5)), Box("bus", 0.4, (0, 0, 1, 1)))
    return Perception(20, 10, segmentation(), boxes, graph, lines)


def test_by_default_every_part_says_what_was_found() -> None:
    assert verbalize(everything()) == (
        f"{OBJECTS}[0.00, 0.00, 0.50, 1.00] sky, and [0.50, 0.50, 1.00, 1.00] person. "
        f"{OBJECTS}[0.00, 0.00, 1.00, 0.50] car. "
        "The image includes relationships between objects: person (#2) is on horse, and person (#1) is riding horse. "
        "The image includes text descriptions: STOP."
    )
    assert verbalize(Perception(5, 5)) == ""
    assert verbalize(Perception(5, 5, boxes=(), lines=())) == ""


def test_the_originals_faults_are_there_on_demand() -> None:
    parts = verbalized_parts(everything(), ORIGINAL)
    assert parts["segmentation"] == ""  # two boxes for three segments
    assert parts["detection"] == f"{OBJECTS}[-0.05, 0.00, 1.50, 0.50] car, and [-0.15, 0.00, 1.25, 0.50] car."
    assert parts["scene_graph"] == ""  # two relations of three objects
    assert parts["text"] == "The image includes text descriptions:  STOP \n, and  ."
    assert verbalize(Perception(5, 5), ORIGINAL) == "   "


def test_limits_cut_whole_items() -> None:
    boxes = tuple(Box(f"thing {i}", 0.9, (i, 0, i + 1, 1)) for i in range(30))
    seen = Perception(40, 10, boxes=boxes, lines=(TextLine("STOP", 0.9),))
    assert verbalize(seen, replace(DEFAULT, max_boxes=2)).count("thing") == 2
    short = verbalize(seen, replace(DEFAULT, max_characters=300))
    assert len(short) <= 300
    assert short.startswith(f"{OBJECTS}[0.00, 0.00, 0.03, 0.10] thing 0, and")
    assert short.endswith("The image includes text descriptions: STOP.")
    assert verbalize(seen, replace(DEFAULT, max_characters=10)) == ""


@pytest.mark.parametrize("size", [1, 4, 7, 30, 100])
def test_partition_finds_the_largest(size: int) -> None:
    values = np.random.default_rng(size).permutation(size).astype(float).tolist()
    for count in range(1, size + 1):
        found = largest_as_partitioned(values, count)
        assert sorted(values[i] for i in found) == sorted(values)[-count:]
    with pytest.raises(ValueError, match="asked for"):
        largest_as_partitioned(values, size + 1)


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ([3, 7, 0, 5, 6, 1, 2, 4], [6, 3, 4, 1, 0, 7]),
        ([5, 2, 8, 7, 3, 4, 0, 6, 1], [4, 3, 5, 2, 7, 0]),
        ([4, 1, 10, 9, 6, 5, 7, 0, 3, 2, 11, 8], [0, 5, 6, 4, 3, 2, 10, 11]),
        ([5, 12, 10, 7, 3, 9, 4, 6, 0, 8, 11, 1, 2, 13], [6, 0, 1, 7, 5, 9, 10, 3, 2, 13]),
    ],
)
def test_partition_leaves_numpy_1_26s_order(values: list[float], order: list[int]) -> None:
    """Recorded: np.argpartition(values, -len(order))[-len(order):] of numpy 1.26.4."""
    assert largest_as_partitioned(values, len(order)) == order


def test_map_pictures() -> None:
    picture = class_map(segmentation())
    assert picture.shape == (10, 20, 3)
    assert tuple(picture[0, 0]) == class_colour("sky") != class_colour("person") == tuple(picture[9, 19])
    assert not picture[0, 15].any()
    assert not picture[0, 9].any()  # a line beside the segment
    assert original_map(segmentation().ids)[0, 0].tolist() == [0.0, 128 / 255, 0.0]
    with pytest.raises(DataError, match="134"):
        original_map(np.array([134]))


def test_a_conversation_has_the_map_of_its_first_image_with_one() -> None:
    seen = {"a": Perception(4, 4, lines=()), "b": everything(), "c": everything()}
    items = [{"type": "image", "path": name} for name in seen]
    messages = [
        {"role": "user", "content": [*items, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "!"},
    ]
    first, second, third, question = with_aux(messages, seen.__getitem__)[0]["content"]
    assert (first["aux"], set(third["aux"]), question) == ({"text": ""}, {"text"}, {"type": "text", "text": "?"})
    assert second["aux"]["text"] == verbalize(everything())
    assert second["aux"]["map"].getpixel((0, 0)) == class_colour("sky")
    (original,) = with_aux([{"role": "user", "content": items[1:2]}], seen.__getitem__, ORIGINAL)[0]["content"]
    assert original["aux"]["map"].getpixel((0, 0)) == (0, 128, 0)
    assert original["aux"]["text"] == verbalize(everything(), ORIGINAL)


def test_results_survive_json() -> None:
    content = json.loads(json.dumps(everything().to_json()))
    again = Perception.from_json(content)
    assert again == everything()
    assert again.segmentation.ids.dtype == np.int32
    assert Perception.from_json({"width": 3, "height": 2}) == Perception(3, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"boxes": [["car", 0.9, [1, 2, 3]]]},
        {"scene_graph": {"source": "x", "objects": [], "relations": [[0, 1, "on", 1.0]]}},
        {"segmentation": {"shape": [10, 20], "runs": [0, 199], "segments": []}},
        {"lines": 3},
    ],
)
def test_damaged_results_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="record 7"):
        Perception.from_json({**everything().to_json(), **change}, "record 7")


def test_rules_say_where_things_are_and_that_they_are_rules() -> None:
    def related(**boxes: tuple[int, int, int, int]) -> str:
        seen = Perception(100, 100, boxes=tuple(Box(name, 0.9, bounds) for name, bounds in boxes.items()))
        (graph,) = SpatialRules().relate([], [seen])
        assert graph.source == "rules"
        assert all(0.8 <= relation.score <= 1 for relation in graph.relations)
        return verbalize(replace(seen, boxes=None, scene_graph=graph)).rpartition(": ")[2]

    assert related(cup=(20, 20, 30, 41), table=(10, 40, 60, 70)) == "cup is on table."
    assert related(apple=(22, 22, 28, 28), bowl=(20, 20, 40, 35)) == "apple is in bowl."
    assert related(lamp=(20, 0, 50, 20), table=(20, 30, 40, 60)) == "lamp is over table."
    assert related(cat=(10, 50, 30, 70), dog=(32, 48, 55, 70)) == "cat is beside dog."
    assert related(person=(40, 30, 50, 90), house=(0, 0, 100, 100)) == "person is in front of house."
    assert related(bird=(0, 0, 5, 5), car=(70, 70, 99, 99)) == ""


def test_replay_gives_what_was_recorded_in_the_size_that_is_asked_for(tmp_path: Path) -> None:
    image = PIL.Image.radial_gradient("L").resize((40, 20)).convert("RGB")
    image.save(tmp_path / "a.png")
    record = {"image": "a.png", **everything().to_json()}
    (tmp_path / "seen.jsonl").write_text(json.dumps(record) + "\n")
    replay = Replay(tmp_path / "seen.jsonl")
    assert replay.tasks == ("segmenter", "detector", "relator", "reader")
    perceiver = Perceiver(**dict.fromkeys(replay.tasks, replay), stretch_to=10)
    (seen,) = perceiver.perceive([image])
    assert verbalize(seen) == verbalize(everything())
    assert (seen.width, seen.height, seen.segmentation.ids.shape) == (10, 10, (10, 10))
    assert seen.boxes[0].bounds == (-0.5, 0.0, 15.0, 5.0)
    with pytest.raises(DataError, match=pixel_digest(image.rotate(90))):
        perceiver.perceive([image.rotate(90)])


def test_perceivers_of_other_settings_have_other_names() -> None:
    rules = [SpatialRules(), SpatialRules(max_objects=3)]
    names = [Perceiver(relator=one, stretch_to=size).digest() for one in rules for size in (None, 490)]
    assert len(set(names)) == 4
    assert names[0] == Perceiver(relator=SpatialRules()).digest()


def test_large_images_are_made_smaller() -> None:
    perceiver = Perceiver(max_side=50)
    assert [
        seen.width for seen in perceiver.perceive([PIL.Image.new("L", (200, 10)), PIL.Image.new("L", (40, 9))])
    ] == [
        50,
        40,
    ]


def test_perception_does_not_travel_with_models() -> None:
    from unimoe.conversion.publishing.hub import code_files

    assert "verbalize.py" not in {path.name for path in code_files()}
    assert not [path.name for path in code_files() if "perception" in path.read_text(encoding="utf-8")]


def test_names() -> None:
    assert len(class_names.coco_panoptic_names()) == 133
    assert len(class_names.open_vocabulary_names()) == 1847
    assert [class_names.clean_name(n) for n in ("sky-other-merged", "door-stuff", "wall-brick")] == [
        "sky",
        "door",
        "wall-brick",
    ]
