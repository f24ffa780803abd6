"""What was seen, in the form in which a conversation carries it to a model with a mixer: "aux" of an image item."""

from collections.abc import Callable
from typing import Any

import PIL.Image

from .colour_map import class_map, original_picture
from .results import Perception
from .verbalize import DEFAULT, Verbalization, verbalize


def aux_of(seen: Perception, rules: Verbalization = DEFAULT, with_map: bool = True) -> dict[str, Any]:
    """The text, and a picture of the segments where there are any: "aux" of the image's item in a message.

    Raises:
        DataError: under legacy rules, more segments than the original's colour table has rows.
    """
    aux: dict[str, Any] = {"text": verbalize(seen, rules)}
    if with_map and seen.segmentation is not None:
        ids = seen.segmentation.ids
        aux["map"] = PIL.Image.fromarray(original_picture(ids) if rules.legacy else class_map(seen.segmentation))
    return aux


def with_aux(
    messages: list[dict[str, Any]],
    perception_of: Callable[[Any], Perception],
    rules: Verbalization = DEFAULT,
    with_map: bool = True,
) -> list[dict[str, Any]]:
    """Messages whose image items carry what was seen there; a conversation has one map, that of its first image with one.

    Args:
        perception_of: gives the results of an image, as the item names it.
    """
    found = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            items = []
            for item in content:
                if item.get("type") == "image":
                    image = item["image"] if "image" in item else item["path"]
                    item = {**item, "aux": aux_of(perception_of(image), rules, with_map)}
                    with_map = with_map and "map" not in item["aux"]
                items.append(item)
            message = {**message, "content": items}
        found.append(message)
    return found
