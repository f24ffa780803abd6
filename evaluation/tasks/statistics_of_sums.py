"""Totals that are no means: F1 of POPE, points of MME, word error rates."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics.mme import COGNITION, PERCEPTION
from .item import Item
from .task import Statistic


def pope_statistic(categories: Sequence[str]) -> Statistic:
    """Mean F1 of the categories, from true yes, false yes and false no of each."""

    def counts(item: Item, row: Mapping[str, Any]) -> list[float]:
        numbers = [0.0] * (4 * len(categories))
        start = 4 * categories.index(item.category)
        said_yes, is_yes = row["parsed"] != "no", item.answer != "no"
        numbers[start : start + 4] = [said_yes and is_yes, said_yes and not is_yes, is_yes and not said_yes, 1.0]
        return numbers

    def value(sums: Any) -> Any:
        import numpy as np

        parts = sums.reshape(*sums.shape[:-1], len(categories), 4)
        right, wrong = 2 * parts[..., 0], parts[..., 1] + parts[..., 2]
        present = parts[..., 3] > 0
        f1 = np.divide(right, right + wrong, out=np.zeros_like(right), where=right + wrong > 0)
        return f1.sum(-1) / np.maximum(present.sum(-1), 1)

    return Statistic(counts, value)


def mme_statistic() -> Statistic:
    """Points of the categories, from questions right and asked and pictures with both right; pictures are clusters."""
    categories = (*PERCEPTION, *COGNITION)

    def counts(item: Item, row: Mapping[str, Any]) -> list[float]:
        numbers = [0.0] * (3 * len(categories))
        start = 3 * categories.index(item.category)
        # A picture with both right counts 1/2 with each of its two questions.
        numbers[start : start + 3] = [row["score"], 1.0, row["both"] / 2]
        return numbers

    def value(sums: Any) -> Any:
        import numpy as np

        parts = sums.reshape(*sums.shape[:-1], len(categories), 3)
        asked = parts[..., 1]
        points = 100 * parts[..., 0] + 200 * parts[..., 2]
        return np.divide(points, asked, out=np.zeros_like(points), where=asked > 0).sum(-1)

    return Statistic(counts, value)


def error_rate_statistic() -> Statistic:
    """Errors over words, in percent."""

    def value(sums: Any) -> Any:
        import numpy as np

        return 100 * sums[..., 0] / np.maximum(sums[..., 1], 1)

    return Statistic(lambda item, row: [row["errors"], row["length"]], value)
