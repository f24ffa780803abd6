"""Answers that must be right to the letter, or up to the normalisation of the VQA servers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .evalai_answers import normalise_answer
from .scores import Scores, percent


def exact_match(predictions: Mapping[Any, str], answers: Mapping[Any, str]) -> Scores:
    """Share in percent of texts that equal the answer once blanks around them are gone: the quickstart's rule."""
    rows = [{"question_id": key, "score": int(text.strip() == answers[key])} for key, text in predictions.items()]
    return Scores(percent(row["score"] for row in rows), "percent", rows)


def majority_answer(answers: Sequence[str]) -> str:
    """The most frequent normalised answer of several people, the first of them on a tie."""
    return Counter(map(normalise_answer, answers)).most_common(1)[0][0]


def majority_match(predictions: Mapping[Any, str], answers: Mapping[Any, Sequence[str]]) -> Scores:
    """Share in percent of normalised texts that equal most people's normalised answer (ClothoAQA)."""
    rows = [
        {"question_id": key, "score": int(normalise_answer(text) == majority_answer(answers[key]))}
        for key, text in predictions.items()
    ]
    return Scores(percent(row["score"] for row in rows), "percent", rows)
