"""Batches whose images carry what a cache says was seen in them; see `unimoe perceive`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...processing.perception.verbalize import DEFAULT, ORIGINAL
from ..data.conversations import ConversationDataset, Sample
from .perception_cache import PerceptionCache


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
        # A model that sees maps as MoAI-7B does reads texts as it does.
        self.rules = ORIGINAL if self.processor.aux_maps == "released" else DEFAULT

    def fit(self, dataset: ConversationDataset) -> None:
        self.collator.fit(dataset)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.collator([self.cache.with_aux(sample, self.rules) for sample in samples])


__all__ = ["PerceivedCollator"]
