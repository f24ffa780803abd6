"""MME: two yes-or-no questions per picture; accuracy, and accuracy of pictures with both right."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import DataError
from .scores import Record, Scores

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
INSTRUCTION = "Please answer yes or no."
_SEEN = 4  # characters
_LINE_END = re.compile(r"\r\n|\r|\n")
GoldKey = tuple[str, str, str]  # category, file name without its suffix, question with the instruction


def parse_yes_no(line: str) -> str:
    """ "yes", "no" or "other", by the first four characters of a line that includes its end."""
    line = line.lower()
    if line in ("yes", "no"):
        return line
    start = line[:_SEEN]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme(gold: Mapping[GoldKey, str], predictions: Sequence[Record]) -> Scores:
    """Points: per category 100 x accuracy + 100 x accuracy of pictures, summed up for perception and cognition.

    Predictions pass through the official result file: only their first line counts, and one with a tab in it is lost,
    which shifts the pairs behind it.

    Args:
        gold: (category, file name without its suffix, question with the instruction) -> "Yes" or "No".
        predictions: `question_id` ("category/file"), `question` and `prediction`, pairs next to each other.

    Raises:
        DataError: a question that the gold files lack.
    """
    rows: list[dict[str, Any]] = []
    kept: dict[str, list[int]] = defaultdict(list)
    for record in predictions:
        category, file = picture_of(record["question_id"])
        line = _LINE_END.split(record["prediction"])[0]
        parsed = parse_yes_no(line + "\n")
        score = int(parsed == _gold_answer(gold, category, file, record["question"]).lower())
        is_lost = "\t" in line
        row = {"question_id": record["question_id"], "question": record["question"], "parsed": parsed}
        rows.append({**row, "score": 0 if is_lost else score})
        if not is_lost:
            kept[category].append(score)
    return _totals(kept, rows)


def picture_of(path: str) -> tuple[str, str]:
    """ "artwork/images/12.jpg" -> ("artwork", "12")."""
    parts = path.split("/")
    return parts[0], parts[-1].partition(".")[0]


def category_points(right: Sequence[int]) -> float:
    """Points of one category, of which questions 2i and 2i + 1 share a picture: at most 200."""
    pairs = [sum(right[start : start + 2]) == 2 for start in range(0, len(right), 2)]
    return sum(right) / len(right) * 100 + sum(pairs) / len(pairs) * 100


def _totals(kept: Mapping[str, Sequence[int]], rows: list[dict[str, Any]]) -> Scores:
    points = {name: category_points(kept[name]) for name in (*PERCEPTION, *COGNITION) if kept.get(name)}
    perception = sum(points[name] for name in PERCEPTION if name in points)
    cognition = sum(points[name] for name in COGNITION if name in points)
    per_category = {"Perception": perception, "Cognition": cognition, **points}
    return Scores(perception + cognition, "points", rows, per_category, {"metric": "perception + cognition"})


def _gold_answer(gold: Mapping[GoldKey, str], category: str, file: str, question: str) -> str:
    asked = question if INSTRUCTION in question else f"{question} {INSTRUCTION}"
    # Some of the official lines have two blanks there.
    for form in (asked, asked.replace(f" {INSTRUCTION}", f"  {INSTRUCTION}")):
        if (category, file, form) in gold:
            return gold[category, file, form]
    raise DataError(f"MME's gold files have no question {asked!r} about {category}/{file}: check the files.")
