"""Two runs on the same items: is the difference beyond noise?"""

from dataclasses import dataclass

import numpy as np

from .intervals import CONFIDENCE, RESAMPLES, Additive


@dataclass(frozen=True)
class Difference:
    """Second run minus first, in the unit of the task, with its 95 % interval.

    Fields:
        clusters: how many independent groups of items both runs have.
        is_beyond_noise: whether the interval leaves 0 out.
    """

    first: float
    second: float
    low: float
    high: float
    clusters: int

    @property
    def value(self) -> float:
        return self.second - self.first

    @property
    def is_beyond_noise(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(first: Additive, second: Additive, seed: int = 0) -> Difference:
    """The difference on the clusters that both have, drawn again together: what both find hard cancels out."""
    places = {key: i for i, key in enumerate(second.keys)}
    shared = [(i, places[key]) for i, key in enumerate(first.keys) if key in places]
    if not shared:
        return Difference(float("nan"), float("nan"), float("nan"), float("nan"), 0)
    ours, theirs = (list(side) for side in zip(*shared, strict=True))
    keys = [first.keys[i] for i in ours]
    pair = [
        Additive(keys, first.sums[ours], first.statistic, first.is_share),
        Additive(keys, second.sums[theirs], second.statistic, second.is_share),
    ]
    # The same seed draws the same clusters.
    replicates = pair[1].replicates(seed, RESAMPLES) - pair[0].replicates(seed, RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Difference(pair[0].total, pair[1].total, float(low), float(high), len(keys))
