"""Two evaluated runs, task by task."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .noise.comparison import Difference, paired_difference
from .noise.intervals import Additive
from .results import SCORES, read_results, sums_of
from .tasks.catalogue import TASKS
from .tasks.item import Item


@dataclass(frozen=True)
class TaskComparison:
    """The difference on one task.

    Fields:
        better, worse: on how many items the second run scores higher or lower (of error rates: the other way round).
        lower_is_better: of error rates.
    """

    name: str
    title: str
    unit: str
    difference: Difference
    better: int
    worse: int
    lower_is_better: bool

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.difference.clusters:
            return "no item in common"
        if not self.difference.is_beyond_noise:
            return "within noise"
        return "better" if (self.difference.value > 0) != self.lower_is_better else "worse"


def compare_runs(first: Path, second: Path) -> list[TaskComparison]:
    """The tasks that both runs have scored, on the items that both have answered.

    Raises:
        DataError: a folder holds no evaluation, or they have no scored task in common.
    """
    results = [
        {row["name"]: row for row in read_results(folder) if row["score"] is not None} for folder in (first, second)
    ]
    names = [name for name in results[0] if name in results[1] and name in TASKS]
    if not names:
        raise DataError(f"{first} and {second} have no scored task in common.")
    return [_compare(name, results[0][name], first, second) for name in names]


def _compare(name: str, result: dict[str, Any], first: Path, second: Path) -> TaskComparison:
    rows = [_rows(folder, name) for folder in (first, second)]
    shared = [
        key for key, row in rows[0].items() if key in rows[1] and None not in (row["score"], rows[1][key]["score"])
    ]
    first_sums, second_sums = (_sums(name, [side[key] for key in shared], result["unit"]) for side in rows)
    signs = [rows[1][key]["score"] - rows[0][key]["score"] for key in shared]
    lower = bool(result["lower_is_better"])
    higher, smaller = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    better, worse = (smaller, higher) if lower else (higher, smaller)
    return TaskComparison(
        name, result["title"], result["unit"], paired_difference(first_sums, second_sums), better, worse, lower
    )


def _sums(name: str, rows: list[dict[str, Any]], unit: str) -> Additive:
    items = [
        Item(row["question_id"], "", row["gold"], category=row["category"], cluster=row["cluster"]) for row in rows
    ]
    return sums_of(TASKS[name], items, rows, unit)


def _rows(folder: Path, name: str) -> dict[Any, dict[str, Any]]:
    file = folder / SCORES / f"{name}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return {row["question_id"]: row for row in map(json.loads, filter(None, lines))}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} cannot be read ({error}): evaluate {folder} again with --resume.") from error


def comparison_rows(comparisons: list[TaskComparison]) -> list[list[str]]:
    """Cells of a table with its header."""
    rows = [["task", "first", "second", "difference", "95 % interval", "better / worse items", "verdict"]]
    for one in comparisons:
        gap = one.difference
        digits = 3 if one.unit == "fraction" else 1
        rows.append(
            [
                one.name,
                f"{gap.first:.{digits}f}",
                f"{gap.second:.{digits}f}",
                f"{gap.value:+.{digits}f}",
                f"{gap.low:+.{digits}f} to {gap.high:+.{digits}f}",
                f"{one.better} / {one.worse}",
                one.verdict,
            ]
        )
    return rows
