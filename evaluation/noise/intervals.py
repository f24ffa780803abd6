"""95 % intervals of scores by the bootstrap, with items that share an image drawn together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tasks.item import Item
from ..tasks.task import Statistic

RESAMPLES = 2000
CONFIDENCE = 0.95
_CHUNK = 1 << 22  # random numbers at a time


@dataclass(frozen=True)
class Additive:
    """Numbers that add up over clusters of items, and how their sums become the total.

    Fields:
        keys: the clusters.
        sums: float [clusters, k].
        value: sums [..., k] -> total [...].
        is_share: whether the total is the mean of zeros and ones.
    """

    keys: list[str]
    sums: np.ndarray
    statistic: Statistic
    is_share: bool

    @property
    def total(self) -> float:
        return float(self.statistic.value(self.sums.sum(0)))

    def replicates(self, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
        """Totals [resamples] of clusters drawn again with replacement."""
        rng = np.random.default_rng(seed)
        number = len(self.keys)
        chunk = max(1, _CHUNK // number)
        totals = []
        for start in range(0, resamples, chunk):
            size = min(chunk, resamples - start)
            drawn = rng.integers(number, size=(size, number))
            weights = np.apply_along_axis(np.bincount, 1, drawn, minlength=number)
            totals.append(self.statistic.value(weights @ self.sums))
        return np.concatenate(totals)


def mean_statistic(scale: float) -> Statistic:
    """The mean of the rows' scores, times the scale of the total (100 for percent)."""
    return Statistic(
        lambda item, row: [scale * row["score"], 1.0],
        lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1e-300),
    )


def additive(
    items: Sequence[Item], rows: Sequence[Mapping[str, Any]], statistic: Statistic | None, scale: float
) -> Additive:
    """Sums per cluster. Rows without a score are left out.

    Args:
        items, rows: in the same order.
        statistic: how the total comes about; None: the mean.
        scale: of a mean, from rows to the total.
    """
    chosen = statistic or mean_statistic(scale)
    clusters: dict[str, np.ndarray] = {}
    values = set()
    for item, row in zip(items, rows, strict=True):
        if row["score"] is not None:
            counts = np.asarray(chosen.counts(item, row), dtype=np.float64)
            clusters[item.cluster_key] = clusters.get(item.cluster_key, 0.0) + counts
            values.add(row["score"])
    sums = np.stack(list(clusters.values())) if clusters else np.zeros((0, 2))
    return Additive(list(clusters), sums, chosen, statistic is None and values <= {0, 1})


def interval(data: Additive, replicates: np.ndarray, scale: float) -> tuple[float, float]:
    """Where 95 % of the replicates lie. Where every row is 0, or every row is 1, the exact bound of a share is taken.

    The bootstrap cannot see what did not happen: of n clusters that are all right it would say 100 to 100 %.
    """
    tail = (1 - CONFIDENCE) / 2
    if data.is_share and len({round(total, 12) for total in (data.sums[:, 0] / data.sums[:, 1])}) == 1:
        share = float(data.sums[0, 0] / data.sums[0, 1]) / scale
        bound = tail ** (1 / len(data.keys))
        if share in (0.0, 1.0):
            return (scale * bound, scale) if share else (0.0, scale * (1 - bound))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)
