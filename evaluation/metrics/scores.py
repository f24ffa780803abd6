"""What every metric returns, and the arithmetic that they share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """A benchmark's result.

    Fields:
        score: the number that the benchmark publishes; None where only its own server can compute it.
        unit: "percent", "fraction" or what the benchmark calls its points.
        per_sample: one mapping per item, with `question_id`, `score` (None: left out of the total) and, where an
            answer is extracted from the text first, `parsed`.
        per_category: the original scorer's break-down, in its own form.
        details: counts and variants, under the names of the original's output.
    """

    score: float | None
    unit: str
    per_sample: list[dict[str, Any]]
    per_category: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def mean(values: Iterable[float]) -> float:
    """Sum over count; 0 of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def percent(right: Iterable[float]) -> float:
    """Mean of zeros and ones, in percent."""
    return mean(right) * 100


def two_decimals(value: float) -> float:
    """A number as a scorer prints it that prints two decimals."""
    return float(f"{value:.2f}")


def texts_by_id(predictions: Sequence[Record]) -> dict[Any, str]:
    """question_id -> text; of several predictions of one question the last counts."""
    return {record["question_id"]: record["prediction"] for record in predictions}


def first_of(records: Sequence[Record], name: str) -> list[Any]:
    """The distinct values of a field, in order of first appearance."""
    return list(dict.fromkeys(record[name] for record in records))
