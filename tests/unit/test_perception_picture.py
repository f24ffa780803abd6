"""Pictures of what was seen: every label inside, none on another, and marks where things are."""

import numpy as np
import PIL.Image

from unimoe.processing.perception.labels import LabelPlacer, font_of
from unimoe.processing.perception.picture import perception_picture, wrapped
from unimoe.processing.perception.results import (
    Box,
    GraphObject,
    Perception,
    Relation,
    SceneGraph,
    Segment,
    Segmentation,
)
from unimoe.processing.perception.verbalize import verbalize

WIDTH, HEIGHT = 320, 240


def crowd() -> Perception:
    rng = np.random.default_rng(0)
    corners = rng.uniform(-10, 200, (25, 2))
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, rng.uniform(5, 90, (25, 2)), strict=True)]
    return Perception(WIDTH, HEIGHT, boxes=tuple(Box(f"some kind of thing {i}", 0.9, b) for i, b in enumerate(boxes)))


def test_labels_are_inside_and_apart() -> None:
    placer = LabelPlacer((960, 720), font_of(15))
    wanted = [(tuple(3 * edge for edge in box.bounds), box.name, (9, 9, 9)) for box in crowd().boxes]
    labels = list(placer.place(wanted))
    assert len(labels) == len(wanted)
    for i, label in enumerate(labels):
        left, top, right, bottom = label.bounds
        assert left >= 0 <= top
        assert right <= 960
        assert bottom <= 720
        assert font_of(15).getlength(label.text) <= right - left
        for other in labels[:i]:
            apart = left >= other.bounds[2] or other.bounds[0] >= right or top >= other.bounds[3]
            assert apart or other.bounds[1] >= bottom


def test_long_labels_are_shortened_and_crowds_end() -> None:
    placer = LabelPlacer((100, 40), font_of(15))
    labels = list(placer.place([((0.0, 0.0, 9.0, 9.0), "a name that is far too long for it", (0, 0, 0))] * 9))
    assert labels[0].text.endswith("…")
    assert len(labels) <= 2


def test_a_box_a_segment_and_an_arrow_are_where_things_are() -> None:
    image = PIL.Image.new("RGB", (WIDTH, HEIGHT), "black")
    box = Box("car", 0.9, (40, 40, 120, 100))
    plain = np.asarray(perception_picture(image, Perception(WIDTH, HEIGHT, boxes=(box,))))
    scale, margin = 3, 20
    edge = plain[margin + scale * 70, margin + scale * 40 - 4 : margin + scale * 40 + 4]
    assert edge.max() > 100
    assert not plain[margin + scale * 80, margin + scale * 80].any()

    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    ids[100:200, 100:200] = 4
    seen = Perception(WIDTH, HEIGHT, Segmentation(ids, (Segment(4, "grass-merged"),)))
    tinted = np.asarray(perception_picture(image, seen))
    assert tinted[margin + scale * 150, margin + scale * 150].argmax() == 1  # green
    assert not tinted[margin + scale * 50, margin + scale * 50].any()

    objects = (GraphObject("a", (0, 0, 20, 20)), GraphObject("b", (280, 200, 320, 240)))
    graph = Perception(WIDTH, HEIGHT, scene_graph=SceneGraph(objects, (Relation(0, 1, "on", 0.9),)))
    drawn = np.asarray(perception_picture(image, graph))
    middle = drawn[margin + scale * 130 : margin + scale * 170, margin + scale * 180 : margin + scale * 215]
    assert (middle.reshape(-1, 3).max(0) >= (200, 60, 0)).all()
    assert drawn.shape[0] > plain.shape[0]  # the list of relations


def test_text_is_wrapped_within_its_width() -> None:
    font = font_of(18)
    sentence = verbalize(crowd())
    lines = wrapped(f"{sentence} {'x' * 300}", font, 500)
    assert max(map(font.getlength, lines)) <= 500
    assert "".join(lines).replace(" ", "") == f"{sentence}{'x' * 300}".replace(" ", "")


def test_an_image_where_nothing_was_seen() -> None:
    picture = perception_picture(PIL.Image.new("L", (5, 400)), Perception(5, 400))
    assert picture.width >= 760
