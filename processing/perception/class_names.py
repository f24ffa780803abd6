"""The names that MoAI's vision models use: facts that their checkpoints do not hold, or hold in another order."""

import json
from functools import lru_cache
from pathlib import Path

_FILE = Path(__file__).with_name("class_names.json")
# Taken off in this order, as the original does: "floor-other-merged" is "floor", "rug-merged" is "rug".
_ENDINGS = ("-merged", "-other", "-stuff")


def coco_panoptic_names() -> tuple[str, ...]:
    """The 133 classes of COCO's panoptic task: 80 things, then 53 kinds of stuff."""
    return _names()["coco_panoptic"]


def psg_predicates() -> tuple[str, ...]:
    """The 56 predicates of PSG."""
    return _names()["psg_predicates"]


def open_vocabulary_names() -> tuple[str, ...]:
    """The 1847 queries of MoAI's open-vocabulary detector: 847 of ADE20K, 1000 of ImageNet; some occur twice."""
    return _names()["ade20k_847"] + _names()["imagenet_1000"]


def clean_name(name: str) -> str:
    """A class name without what only its data set means by it."""
    for ending in _ENDINGS:
        name = name.replace(ending, "")
    return name


@lru_cache(maxsize=1)
def _names() -> dict[str, tuple[str, ...]]:
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    return {key: tuple(names) for key, names in content.items()}
