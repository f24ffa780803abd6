"""The one table of a run, as cells."""

from collections.abc import Sequence

from ..task_result import TaskResult

# Independent items below which an interval says little.
_FEW = 30
HEADER = ["task", "modality", "score", "95 % interval", "n", "chance", "majority", "failed", "scored by"]


def table_rows(results: Sequence[TaskResult]) -> list[list[str]]:
    """One row per task, without the header."""
    return [_row(result) for result in results]


def few_items_note(results: Sequence[TaskResult]) -> str:
    """A sentence about scores that come from few independent items; an empty text where there are none."""
    few = [
        f"{result.name} ({result.clusters})" for result in results if result.low is not None and result.clusters < _FEW
    ]
    if not few:
        return ""
    return (
        f"Fewer than {_FEW} independent items: {', '.join(few)}. The interval of so few is itself a rough guess, and often "
        "too narrow: ask more items before you conclude anything."
    )


def number(value: float | None, unit: str) -> str:
    """A score in its unit: fractions with three digits, the rest with one."""
    return "-" if value is None else f"{value:.3f}" if unit == "fraction" else f"{value:.1f}"


def _row(result: TaskResult) -> list[str]:
    unit = result.unit
    ends = "-" if result.low is None else f"{number(result.low, unit)} to {number(result.high, unit)}"
    shown = {"percent": " %", "fraction": "", "points": " points"}.get(unit, f" {unit}")
    score = "not scored yet" if result.score is None else f"{number(result.score, unit)}{shown}"
    n = str(result.n) + (f" in {result.clusters} groups" if 0 < result.clusters < result.n else "")
    baselines = [number(result.chance, unit), number(result.majority, unit)]
    return [result.name, result.modality, score, ends, n, *baselines, str(result.failed), _scored_by(result)]


def _scored_by(result: TaskResult) -> str:
    if result.score is None and result.submission:
        return f"{result.scored_by}: {result.submission}"
    return result.scored_by


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns for the screen."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
