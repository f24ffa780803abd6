"""A picture of what was seen in an image: segments, boxes and text in their places, and below them the sentence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from .class_names import clean_name
from .colour_map import class_colour, resized_ids
from .labels import Label, LabelPlacer, font_of
from .results import Bounds, Perception, Point
from .spatial_relations import SOURCE as RULES
from .verbalize import DEFAULT, Verbalization, numbered_names, told_relations, verbalize

Colour = tuple[int, int, int]

# Pixels: the image's longer side, the least width of the text below it, and margins.
_IMAGE_SIDE, _LEAST_WIDTH, _MARGIN, _GAP = 960, 760, 20, 8
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 24, 28), (110, 110, 118)
_TEXT_COLOUR, _RELATION_COLOUR = (0, 110, 200), (200, 60, 0)
_SEGMENT_OPACITY = 0.45
_FONT_SIZE, _TITLE_SIZE, _LABEL_SIZE = 18, 15, 15
# More would hide the image.
_MOST_LABELS = 40


@dataclass(frozen=True)
class _Mark:
    """Something with a place in the image; segments show their shape themselves and get no outline."""

    bounds: Bounds
    text: str
    colour: Colour
    corners: tuple[tuple[float, float], ...] = ()
    has_outline: bool = True


def perception_picture(image: PIL.Image.Image, seen: Perception, rules: Verbalization = DEFAULT) -> PIL.Image.Image:
    """An RGB picture: the image with everything that was found, a list of the relations, and the text of `verbalize`.

    Marks are drawn in the image's own proportions, wherever they were found. What is below the thresholds of `rules` is not
    told, and so not drawn.
    """
    scale = _IMAGE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    photo = image.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS)
    photo = _with_segments(photo, seen)
    scales = size[0] / seen.width, size[1] / seen.height
    _draw_in_place(photo, _scaled(_marks(seen, rules), *scales), _arrows(seen, rules, *scales))
    text = _text_block(seen, rules, max(size[0], _LEAST_WIDTH))
    width = max(size[0], text.width) + 2 * _MARGIN
    canvas = PIL.Image.new("RGB", (width, size[1] + text.height + 3 * _MARGIN), _PAPER)
    canvas.paste(photo, ((width - size[0]) // 2, _MARGIN))
    canvas.paste(text, (_MARGIN, size[1] + 2 * _MARGIN))
    return canvas


def _with_segments(photo: PIL.Image.Image, seen: Perception) -> PIL.Image.Image:
    if seen.segmentation is None:
        return photo
    ids = resized_ids(seen.segmentation.ids, photo.size)
    pixels = np.asarray(photo).astype(np.float32)
    for segment in seen.segmentation.segments:
        inside = ids == segment.id
        colour = np.array(class_colour(segment.name), dtype=np.float32)
        pixels[inside] = (1 - _SEGMENT_OPACITY) * pixels[inside] + _SEGMENT_OPACITY * colour
    edges = np.zeros(ids.shape, dtype=bool)
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edges[1:] |= ids[1:] != ids[:-1]
    pixels[edges] = 255
    return PIL.Image.fromarray(pixels.round().astype(np.uint8))


def _marks(seen: Perception, rules: Verbalization) -> list[_Mark]:
    """Small things last, so that they lie on top of large ones."""
    marks = []
    if seen.segmentation is not None:
        bounds = seen.segmentation.bounds()
        for segment in (s for s in seen.segmentation.segments if s.id in bounds):
            name = f"{clean_name(segment.name)} {segment.score:.2f}"
            marks.append(_Mark(bounds[segment.id], name, class_colour(segment.name), has_outline=False))
    for box in seen.boxes or ():
        if box.score >= rules.min_box_score:
            marks.append(_Mark(box.bounds, f"{box.name} {box.score:.2f}", class_colour(box.name)))
    for line in seen.lines or ():
        if line.score >= rules.min_line_score and line.corners:
            xs, ys = zip(*line.corners, strict=True)
            bounds_of_line = (min(xs), min(ys), max(xs), max(ys))
            marks.append(_Mark(bounds_of_line, f'"{line.text}" {line.score:.2f}', _TEXT_COLOUR, line.corners))
    marks.sort(key=lambda mark: -_area(mark.bounds))
    return marks


def _scaled(marks: Iterable[_Mark], x: float, y: float) -> list[_Mark]:
    return [
        _Mark(
            (mark.bounds[0] * x, mark.bounds[1] * y, mark.bounds[2] * x, mark.bounds[3] * y),
            mark.text,
            mark.colour,
            tuple((left * x, top * y) for left, top in mark.corners),
            mark.has_outline,
        )
        for mark in marks
    ]


def _draw_in_place(
    photo: PIL.Image.Image, marks: Sequence[_Mark], arrows: Sequence[tuple[Point, Point] | None]
) -> None:
    """Outlines, arrows with the numbers that the list below the picture has, and on top of them all labels."""
    draw = PIL.ImageDraw.Draw(photo)
    for mark in marks:
        _outline(draw, mark)
    wanted: list[tuple[Bounds, str, Colour]] = []
    for number, arrow in enumerate(arrows, 1):
        if arrow is not None:
            x, y = _draw_arrow(draw, *arrow)
            wanted.append(((x - 9, y, x + 9, y), str(number), _RELATION_COLOUR))
    # The smallest get their labels first: they have the least room.
    wanted += [(mark.bounds, mark.text, mark.colour) for mark in reversed(marks[-_MOST_LABELS:])]
    placer = LabelPlacer(photo.size, font_of(_LABEL_SIZE))
    for label in placer.place(wanted):
        _draw_label(draw, label, placer.font)


def _arrows(seen: Perception, rules: Verbalization, x: float, y: float) -> list[tuple[Point, Point] | None]:
    """From the middle of the subject to that of the object, per relation that is told; None where a place is unknown."""
    if seen.scene_graph is None:
        return []
    objects = seen.scene_graph.objects
    arrows: list[tuple[Point, Point] | None] = []
    for relation in told_relations(seen.scene_graph, rules):
        ends = [objects[i].bounds for i in (relation.subject, relation.object)]
        middles = [((b[0] + b[2]) / 2 * x, (b[1] + b[3]) / 2 * y) for b in ends if b is not None]
        arrows.append((middles[0], middles[1]) if len(middles) == len(ends) else None)
    return arrows


def _draw_arrow(draw: PIL.ImageDraw.ImageDraw, start: Point, end: Point) -> Point:
    """Draw it, and say where its number belongs."""
    begin, tip = np.array(start), np.array(end)
    along = (tip - begin) / max(float(np.hypot(*(tip - begin))), 1.0)
    across = np.array([-along[1], along[0]])
    shaft = [tuple(begin), tuple(tip - 12 * along)]
    draw.line(shaft, fill=_PAPER, width=6)
    draw.line(shaft, fill=_RELATION_COLOUR, width=3)
    head = [tuple(tip), tuple(tip - 16 * along + 7 * across), tuple(tip - 16 * along - 7 * across)]
    draw.polygon(head, fill=_RELATION_COLOUR, outline=_PAPER)
    x, y = (begin + 0.4 * (tip - begin)).tolist()
    return x, y


def _outline(draw: PIL.ImageDraw.ImageDraw, mark: _Mark) -> None:
    if not mark.has_outline:
        return
    left, top, right, bottom = mark.bounds
    corners = list(mark.corners) or [(left, top), (right, top), (right, bottom), (left, bottom)]
    closed = [*corners, corners[0]]
    draw.line(closed, fill=_PAPER, width=5, joint="curve")
    draw.line(closed, fill=mark.colour, width=3, joint="curve")


def _draw_label(draw: PIL.ImageDraw.ImageDraw, label: Label, font: PIL.ImageFont.FreeTypeFont) -> None:
    left, top, right, bottom = label.bounds
    if label.anchor is not None:
        draw.line([label.anchor, ((left + right) / 2, (top + bottom) / 2)], fill=label.colour, width=2)
    draw.rounded_rectangle(label.bounds, radius=4, fill=label.colour, outline=(255, 255, 255))
    bright = 0.299 * label.colour[0] + 0.587 * label.colour[1] + 0.114 * label.colour[2] > 150
    draw.text((left + 5, (top + bottom) / 2), label.text, font=font, fill=_INK if bright else _PAPER, anchor="lm")


def _text_block(seen: Perception, rules: Verbalization, width: int) -> PIL.Image.Image:
    """Relations, a row each, and the sentence."""
    font, title = font_of(_FONT_SIZE), font_of(_TITLE_SIZE)
    rows: list[tuple[str, PIL.ImageFont.FreeTypeFont, Colour]] = []
    graph = seen.scene_graph
    if graph is not None and graph.relations:
        names = numbered_names([one.name for one in graph.objects])
        how = "found by rules about boxes, not by a model" if graph.source == RULES else f"found by {graph.source}"
        rows.append((f"Relations ({how})", title, _FAINT))
        for number, relation in enumerate(told_relations(graph, rules), 1):
            line = f"{number}  {names[relation.subject]} is {relation.predicate} {names[relation.object]}"
            parts = wrapped(f"{line}   {relation.score:.2f}", font, width)
            rows += [(part, font, _RELATION_COLOUR) for part in parts]
        rows.append(("", title, _FAINT))
    rows.append(("The model reads", title, _FAINT))
    sentence = verbalize(seen, rules).strip() or "(nothing was seen)"
    rows += [(part, font, _INK) for part in wrapped(sentence, font, width)]
    heights = [sum(one_font.getmetrics()) + _GAP // 2 for _, one_font, _ in rows]
    block = PIL.Image.new("RGB", (width, sum(heights)), _PAPER)
    draw, y = PIL.ImageDraw.Draw(block), 0
    for (text, one_font, colour), height in zip(rows, heights, strict=True):
        draw.text((0, y), text, font=one_font, fill=colour)
        y += height
    return block


def wrapped(text: str, font: PIL.ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of a text that are at most so many pixels wide; words that are too long are broken."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width:
            fits = max(1, next(n for n in range(len(word)) if font.getlength(word[: n + 1]) > width))
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line]


def _area(bounds: Bounds) -> float:
    return (bounds[2] - bounds[0]) * (bounds[3] - bounds[1])
