"""ANLS, the average normalised Levenshtein similarity: DocVQA and InfographicVQA."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .edit_distance import edit_distance
from .scores import Record, Scores, mean

THRESHOLD = 0.5
# InfographicVQA's types: field of the question -> (section of the result, value in the data -> printed name).
_TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "answer_type": (
        "answer_types",
        {
            "image span": "Image-Span",
            "question span": "Question-Span",
            "multiple spans": "Multi-Span",
            "non span": "None span",
        },
    ),
    "evidence": (
        "evidence_types",
        {
            "table/list": "Table/list",
            "textual": "Text",
            "photo/pciture/visual_objects": "Visual/Layout",  # spelt so in the data
            "figure": "Figure",
            "map": "Map",
        },
    ),
    "operation/reasoning": (
        "operation_types",
        {"comparison": "Sorting", "arithmetic": "Arithmetic", "counting": "Counting"},
    ),
}


def anls_of(prediction: str, answers: Sequence[str]) -> float:
    """Similarity in [0, 1] to the nearest answer; 0 below one half.

    White space and case do not count for the distance, but blanks do count for the length that divides it.
    """
    distance = min(_distance(prediction, answer) for answer in answers)
    similarity = 1 - distance
    return similarity if similarity >= THRESHOLD else 0


def _distance(prediction: str, answer: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    return edit_distance(_plain(answer), _plain(prediction)) / length if length else 0.0


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


def anls(questions: Sequence[Record], predictions: Mapping[Any, str]) -> Scores:
    """Mean similarity as a fraction, and per type where the questions carry InfographicVQA's types.

    Args:
        questions: `questionId` and `answers`; lists under `answer_type`, `evidence`, `operation/reasoning` if they have
            types.
        predictions: question id -> text; a missing one scores 0.
    """
    rows = []
    sections: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        key = question["questionId"]
        score = anls_of(predictions[key], question["answers"]) if key in predictions else 0
        rows.append({"question_id": key, "score": score})
        for name, (section, _) in _TYPES.items():
            for value in question.get(name, ()):
                sections[section][value].append(score)
    per_category = {
        section: {name: mean(sections[section][value]) for value, name in names.items() if sections[section][value]}
        for section, names in _TYPES.values()
        if section in sections
    }
    return Scores(mean(row["score"] for row in rows), "fraction", rows, per_category)
