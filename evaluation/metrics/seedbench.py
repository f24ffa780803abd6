"""SEED-Bench: the text must be the letter."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .scores import Record, Scores, percent, two_decimals

# The names that the first-character variant gives to the types 1 to 9.
_VARIANT_NAMES = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attribute",
    "Instance Location",
    "Instance Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Recognition",
)


def seedbench(questions: Sequence[Record], type_names: Mapping[str, int], predictions: Sequence[Record]) -> Scores:
    """Accuracy in percent: total, per question type, of images and of videos; a missing prediction is wrong.

    Args:
        questions: `question_id` (text), `answer` (letter), `data_type` ("image" or "video") and `question_type_id`.
        type_names: name of a question type -> its id.
        predictions: `question_id` (a number where the question's is one) and `prediction`.
    """
    texts = {record["question_id"]: record["prediction"] for record in predictions}
    rows = []
    groups: dict[Any, list[int]] = defaultdict(list)
    for question in questions:
        key = _key(question["question_id"])
        score = int(texts.get(key) == question["answer"])
        rows.append({"question_id": key, "score": score})
        groups[question["question_type_id"]].append(score)
        groups[f"{question['data_type']} accuracy"].append(score)
    ordered = sorted(type_names.items(), key=lambda named: named[1])
    per_category = {name: two_decimals(percent(groups[i])) for name, i in ordered if i in groups}
    kinds = ("image accuracy", "video accuracy")
    per_category |= {kind: two_decimals(percent(groups[kind])) for kind in kinds if kind in groups}
    total = two_decimals(percent(row["score"] for row in rows))
    details = {"variants": {"first_character_images_only": _first_character_images_only(questions, texts)}}
    return Scores(total, "percent", rows, per_category, details)


def _first_character_images_only(questions: Sequence[Record], texts: Mapping[Any, str]) -> dict[str, Any]:
    """Another code base's rule: first character in upper case; only images that have an answer."""
    groups: dict[int, list[int]] = defaultdict(list)
    for question in questions:
        text = texts.get(_key(question["question_id"]), "")
        if text and question["data_type"] == "image":
            groups[question["question_type_id"]].append(int(text[0].upper() == question["answer"]))
    named = {name: percent(groups[i]) for i, name in enumerate(_VARIANT_NAMES, 1) if i in groups}
    every = [score for i in range(1, len(_VARIANT_NAMES) + 1) for score in groups.get(i, ())]
    return {"score": percent(every), "per_category": named}


def _key(question_id: Any) -> Any:
    text = str(question_id)
    # Not int() alone, which also reads "105_7".
    return int(text) if text.isdecimal() else question_id
