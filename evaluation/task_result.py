"""The result of one task with everything one needs to trust it: interval, n, chance, majority, failures."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class TaskResult:
    """The result of one task.

    Fields:
        score: None where a server or a judge has yet to compute it; `low` and `high` are the 95 % interval.
        n: items scored; `clusters`: how many of them are independent; `failed`: items that could not be answered, which
            are not in the score; `left_out`: answered but without a score (random choices, unreadable judgements).
        chance, majority: what guessing and always giving the most frequent answer reach, in the same unit.
        best: the best possible score; None where there is no such thing.
        submission: the file for a server or an external grader.
    """

    name: str
    title: str
    modality: str
    split: str
    scored_by: str
    unit: str
    score: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int
    failed: int
    left_out: int
    chance: float | None = None
    majority: float | None = None
    best: float | None = None
    lower_is_better: bool = False
    submission: str | None = None
    per_category: dict[str, Any] = field(default_factory=dict)
    replicates: np.ndarray | None = None

    @property
    def base(self) -> float:
        """What is had for nothing."""
        return next((value for value in (self.chance, self.majority) if value is not None), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {name: value for name, value in asdict(self).items() if name != "replicates"}
