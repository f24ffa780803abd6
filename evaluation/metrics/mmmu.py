"""MMMU: letters, and short answers that are looked for in free text."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .key_phrases import answer_tails, any_candidate_fits, as_number, numbers_in
from .scores import Record, Scores, mean

SUBJECTS_OF_DOMAIN = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
RANDOM = "RANDOM"
# Substrings on purpose: "this " has "is " in it.
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_END_MARKS = ",.!?;:'"
_MIN_WORDS = 5  # an option's text is looked for in longer responses only


def parse_letter(response: str, options: Sequence[str]) -> str:
    """The letter of the option that a free text names, or RANDOM where the original draws one.

    "(B)" goes before " B ", and that before an option's text; of several the one named last.
    """
    letters = [chr(ord("A") + i) for i in range(len(options))]
    for mark in _END_MARKS:
        response = response.strip(mark)
    response = f" {response} "
    forms = [{letter: f"({letter})" for letter in letters}, {letter: f" {letter} " for letter in letters}]
    lowered = response.lower()
    searches = [(response, form) for form in forms]
    if len(response.split()) > _MIN_WORDS:
        searches.append((lowered, {letter: text.lower() for letter, text in zip(letters, options, strict=True)}))
    for text, form in searches:
        found = [letter for letter in letters if form[letter] in text]
        if found:
            return max(found, key=lambda letter: text.rfind(form[letter]))
    return RANDOM


def parse_short_answer(response: str) -> list[str | float]:
    """The candidates in a free text: tails, and the numbers in them, normalised."""
    response = response.strip().strip(".").lower()
    tails = answer_tails(response.split("\n"), _INDICATORS) or [response]
    numbers = [number for tail in tails for number in numbers_in(tail, ",", ends_at_word=True)]
    return [form for text in (*tails, *numbers) for form in _normalised(text)]


def _normalised(text: str) -> list[str | float]:
    text = text.strip()
    number = as_number(text)
    if number is not None:
        return [number]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_right(prediction: str, question_type: str, answer: str | Sequence[str]) -> bool:
    """Whether a prediction is right: a letter in exactly this form, or a short answer in a free text."""
    answers = [answer] if isinstance(answer, str) else answer
    if question_type == "multiple-choice":
        return prediction in answers
    normalised = [form for text in answers for form in _normalised(text)]
    return any_candidate_fits(parse_short_answer(prediction), normalised)


def mmmu(gold: Mapping[str, Record], predictions: Mapping[str, str]) -> Scores:
    """Accuracy as a fraction with three decimals: per subject, per domain (weighted by items), overall.

    Args:
        gold: id ("split_Subject_number") -> `question_type` and `ground_truth` (text, or list of texts).
        predictions: id -> text, for multiple choice already a letter (see `parse_letter`); a missing one is wrong.
    """
    rows: list[dict[str, Any]] = []
    by_subject: dict[str, list[int]] = defaultdict(list)
    for key, item in gold.items():
        given = key in predictions
        score = int(given and is_right(predictions[key], item["question_type"], item["ground_truth"]))
        rows.append({"question_id": key, "score": score})
        by_subject[subject_of(key)].append(score)
    per_category = {}
    for domain, subjects in SUBJECTS_OF_DOMAIN.items():
        present = [subject for subject in subjects if subject in by_subject]
        if present:
            per_category[f"Overall-{domain}"] = _summary([s for name in present for s in by_subject[name]])
        per_category |= {subject: _summary(by_subject[subject]) for subject in present}
    every = [row["score"] for row in rows]
    per_category["Overall"] = _summary(every)
    return Scores(round(mean(every), 3), "fraction", rows, per_category, {"score_unrounded": mean(every)})


def subject_of(key: str) -> str:
    """ "validation_Art_Theory_3" -> "Art_Theory"."""
    return re.sub(r"^[^_]+_|_[^_]+$", "", key)


def _summary(right: Sequence[int]) -> dict[str, Any]:
    return {"num": len(right), "acc": round(mean(right), 3)}


def mmmu_letters(gold: Sequence[Record], predictions: Sequence[Record]) -> Scores:
    """Accuracy as a fraction over the items whose prediction names a letter, so that none has to be drawn.

    Args:
        gold: `question_id`, `options` (texts) and `answer` (letter).
        predictions: `question_id` and `prediction`; an item without one is left out too, and counted as missing.
    """
    texts = {record["question_id"]: record["prediction"] for record in predictions}
    rows: list[dict[str, Any]] = []
    for item in gold:
        text = texts.get(item["question_id"])
        parsed = None if text is None else parse_letter(text, item["options"])
        score = None if parsed in (None, RANDOM) else int(parsed == item["answer"])
        rows.append({"question_id": item["question_id"], "parsed": parsed, "score": score})
    known = [row["score"] for row in rows if row["score"] is not None]
    parsed_as = [row["parsed"] for row in rows]
    counts = {"random": parsed_as.count(RANDOM), "correct": sum(known), "missing": parsed_as.count(None)}
    details = {"metric": "accuracy over the items that need no random choice"}
    return Scores(mean(known), "fraction", rows, counts, details)
