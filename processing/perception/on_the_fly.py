"""A processor that looks at images itself: with other vision models, when it prepares messages for a model with mixers."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import PIL.Image

from .auxiliary import aux_of
from .perceiver import Perceiver
from .replay import pixel_digest
from .verbalize import Verbalization, rules_for

# Images whose results are kept: a conversation shows its images again with every turn.
_KEPT = 64


def perceive_images(processor: Any, perceiver: Perceiver, rules: Verbalization | None = None) -> None:
    """From now on, images of messages that bring no "aux" get what a perceiver sees in them.

    This holds for everything that goes through the processor's `apply_chat_template`: chat, transformers' pipelines and
    server. It is not saved with the processor. Maps come along for the first image of a conversation that has one.

    Args:
        processor: a `UniMoeProcessor`.
        rules: of the text; None: see `rules_for`.
    """
    chosen = rules or rules_for(processor)
    kept: OrderedDict[str, dict[str, Any]] = OrderedDict()
    one_at_a_time = threading.Lock()  # a server answers from several threads

    def perceive(images: Sequence[PIL.Image.Image]) -> list[dict[str, Any]]:
        digests = [pixel_digest(image) for image in images]
        with one_at_a_time:
            new = {digest: image for digest, image in zip(digests, images, strict=True) if digest not in kept}
            for digest, seen in zip(new, perceiver.perceive(list(new.values())), strict=True):
                kept[digest] = aux_of(seen, chosen)
            for digest in digests:
                kept.move_to_end(digest)
            found = [kept[digest] for digest in digests]
            while len(kept) > _KEPT:
                kept.popitem(last=False)
            return found

    processor.perceive = perceive
