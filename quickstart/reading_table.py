"""How well words were read, and the table of it: per model the mean over seeds, and the deviation between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..evaluation.metrics.edit_distance import edit_distance
from .comparison_table import spread_of
from .evaluate import Answer
from .photographs import PhotographReading, reading_lines

Results = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Reading:
    """Answers, and the shares of them, in 0..1, that are exactly right and of their characters that are."""

    answers: int
    exact: float
    characters: float


def character_accuracy(said: str, truth: str) -> float:
    """1 less the edits that make one text of the other, per character of the truth; 0 at least."""
    return max(0.0, 1 - edit_distance(said.strip(), truth) / len(truth))


def reading_of(answers: Sequence[Answer]) -> Reading:
    """Both figures as means over the answers, of which there must be some."""
    exact = mean(float(answer.is_right) for answer in answers)
    return Reading(len(answers), exact, mean(character_accuracy(answer.text, answer.truth) for answer in answers))


def table_rows(results: Results) -> list[list[str]]:
    """The header, and a row per model in order of first appearance.

    Args:
        results: one mapping per model and seed with "model" and "readings", which are `Reading`s as mappings, by test.
    """
    tests = list(results[0]["readings"])
    rows = [["model", *(f"{test}: {figure}" for test in tests for figure in ("exact", "characters"))]]
    for name in dict.fromkeys(result["model"] for result in results):
        own = [result["readings"] for result in results if result["model"] == name]
        figures = [
            [100 * reading[test][figure] for reading in own] for test in tests for figure in ("exact", "characters")
        ]
        rows.append([name, *(spread_of(values, 1) for values in figures)])
    return rows


def print_table(summary: dict[str, Any]) -> None:
    """The table as Markdown, and what it is of; `summary` is the content of moai_ocr.json."""
    rows = table_rows(summary["results"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in (rows[0], ["-" * width for width in widths], *rows[1:]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    first, seeds = summary["results"][0], len({result["seed"] for result in summary["results"]})
    counts = ", ".join(f"{reading['answers']} of {test}" for test, reading in first["readings"].items())
    read = ", ".join(f"{100 * share:.1f} % of {test}" for test, share in summary["read_exactly"].items())
    print(
        f"\nAnswers in %, right to the letter and by character: mean ± deviation over {seeds} seeds, {first['steps']} steps "
        f"each;\npictures: {counts}. OCR itself read {read}.\nBoth models train the same "
        f"{first['trained_parameters']:,} parameters. {summary['seconds'] / 60:.1f} minutes in all."
    )
    if summary.get("photographs"):
        print("\n" + "\n".join(reading_lines([PhotographReading(**one) for one in summary["photographs"]])))
