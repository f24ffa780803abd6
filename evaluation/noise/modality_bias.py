"""How unevenly a model masters its modalities.

Uni-MoE's abstract (Li et al. 2024, arXiv:2405.11273) says that the model significantly reduces performance bias in
handling mixed multimodal datasets, and gives no formula. Here the bias is defined as follows. The gain of a task is what
its score is above its base (chance; where that is not known, the most frequent answer; else 0), as a share of what is
possible above it: gain = (score - base) / (best - base). A modality's gain is the mean over its tasks. The bias is the
largest gain of a modality minus the smallest, from 0 (all alike) to 1 and, as gains can be negative, beyond.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..task_result import TaskResult
from .intervals import CONFIDENCE


@dataclass(frozen=True)
class Bias:
    """The bias with its 95 % interval, and the gain of each modality with its own."""

    value: float
    low: float
    high: float
    gains: dict[str, tuple[float, float, float]]


def modality_bias(results: Sequence[TaskResult]) -> Bias | None:
    """The bias over the modalities that have a score; None where there are fewer than two."""
    by_modality: dict[str, list[TaskResult]] = {}
    for result in results:
        if result.replicates is not None and result.best is not None and result.best > result.base:
            by_modality.setdefault(result.modality, []).append(result)
    if len(by_modality) < 2:
        return None
    points = {name: float(np.mean([_gain(r, r.score) for r in rs])) for name, rs in by_modality.items()}
    drawn = {name: np.mean([_gain(r, _replicates(r)) for r in rs], axis=0) for name, rs in by_modality.items()}
    stacked = np.stack(list(drawn.values()))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(stacked.max(0) - stacked.min(0), [tail, 1 - tail])
    gains = {}
    for name, values in drawn.items():
        ends = np.quantile(values, [tail, 1 - tail])
        gains[name] = (points[name], float(ends[0]), float(ends[1]))
    return Bias(max(points.values()) - min(points.values()), float(low), float(high), gains)


def _gain(result: TaskResult, score: Any) -> Any:
    return (score - result.base) / (result.best - result.base)


def _replicates(result: TaskResult) -> np.ndarray:
    """Each task draws its own items, so replicates of tasks are put side by side in an order of their own."""
    import zlib

    rng = np.random.default_rng(zlib.crc32(result.name.encode()))
    return rng.permutation(result.replicates)
