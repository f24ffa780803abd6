"""The table of the routing comparison: per variant the mean over seeds, and the standard deviation between them."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from .evaluate import TASKS

Results = Sequence[dict[str, Any]]


def table_rows(results: Results) -> list[list[str]]:
    """The header and one row per variant, in order of first appearance.

    Args:
        results: one mapping per variant and seed with "variant", "accuracy" (by task, in 0..1), "loss" and "parameters"
            ("total", "active").
    """
    tasks = [task for task in TASKS if task in results[0]["accuracy"]]
    rows = [["model", "parameters", "active", *tasks, "mean", "loss"]]
    for name in dict.fromkeys(result["variant"] for result in results):
        own = [result for result in results if result["variant"] == name]
        size = own[0]["parameters"]
        scores = [[result["accuracy"][task] for result in own] for task in tasks]
        overall = [mean(result["accuracy"][task] for task in tasks) for result in own]
        cells = [spread_of([100 * value for value in values], 1) for values in (*scores, overall)]
        sizes = [f"{size[kind] / 1e6:.2f} M" for kind in ("total", "active")]
        rows.append([name, *sizes, *cells, spread_of([result["loss"] for result in own], 3)])
    return rows


def spread_of(values: Sequence[float], digits: int) -> str:
    """ "mean ± deviation", the deviation being that of a sample; the mean alone of one value."""
    if len(values) < 2:
        return f"{mean(values):.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def print_table(summary: dict[str, Any]) -> None:
    """The table as Markdown, which terminals show just as well, and what it is of."""
    rows = table_rows(summary["results"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    print()
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    seeds = len({result["seed"] for result in summary["results"]})
    steps = summary["results"][0]["steps"]
    print(
        f"\nExact answers in % on held-out items, and the answers' cross entropy: mean ± deviation over {seeds} seeds, "
        f"{steps} steps each,\n{summary['seconds'] / 60:.1f} minutes in all. Parameters are the decoder's; the active ones "
        "differ by the routers' rows only."
    )
