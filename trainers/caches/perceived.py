"""Batches whose images carry what a cache says was seen in them; see `unimoe perceive`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...processing.perception.choice import PerceiverChoice
from ...processing.perception.verbalize import rules_for
from ..data.conversations import ConversationDataset, Sample
from .perception_cache import PerceptionCache, perceiver_folder


class PerceivedCollator:
    """Gives another collator samples whose images have "aux", found by the images' content when a batch needs them.

    Args:
        folder: of the cache, with the results of one perceiver.

    Raises:
        DataError: the cache is damaged, or holds no or several perceivers' results. When called: an image is not in it.
    """

    def __init__(self, collator: Any, folder: str | Path) -> None:
        self.collator, self.processor = collator, collator.processor
        self.cache = PerceptionCache(folder, policy=self.processor.media_policy)
        self.rules = rules_for(self.processor)

    def fit(self, dataset: ConversationDataset) -> None:
        self.collator.fit(dataset)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.collator([self.cache.with_aux(sample, self.rules) for sample in samples])


def keep_perception(model: str | Path, cache: str | Path | None, folder: Path) -> dict[str, str]:
    """Leave in a trained model's folder which vision models it was told of; returns the section of its card, if any.

    Args:
        model: that training started from, whose own choice holds where there is no cache.
        cache: of `unimoe perceive`, as in the recipe.
    """
    chosen = (
        PerceiverChoice.of_folder(model) if cache is None else PerceiverChoice.of_folder(perceiver_folder(Path(cache)))
    )
    if chosen is None:
        return {}
    chosen.save(folder)
    return {"Perception": chosen.card_text()}


__all__ = ["PerceivedCollator", "keep_perception"]
