"""Answers against those of ten people (TextVQA, A-OKVQA, OK-VQA), and against any of several (ST-VQA)."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from .evalai_answers import normalise_answer
from .scores import Record, Scores, mean, two_decimals

_cached_normalise = lru_cache(maxsize=1 << 16)(normalise_answer)


def answer_weights(answers: Sequence[str]) -> dict[str, float]:
    """Normalised answer -> its soft accuracy: min(1, matches / 3), averaged over leaving out each person in turn.

    Of ten people one match gives 0.3, two 0.6, three 0.9 and four 1.
    """
    normalised = [_cached_normalise(answer) for answer in answers]
    weights = {}
    for answer in dict.fromkeys(normalised):
        per_person = [
            min(1.0, sum(other == answer for i, other in enumerate(normalised) if i != left_out) / 3)
            for left_out in range(len(normalised))
        ]
        weights[answer] = sum(per_person) / len(per_person)
    return weights


def soft_accuracy_of(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of one prediction."""
    return answer_weights(answers).get(_cached_normalise(prediction), 0.0)


def soft_accuracy(predictions: Sequence[Record], answers: Mapping[Any, Sequence[str]]) -> Scores:
    """Soft accuracy in percent, over the predictions.

    Args:
        predictions: `question_id` and `prediction` each.
        answers: question_id -> people's answers.
    """
    rows = [
        {"question_id": p["question_id"], "score": soft_accuracy_of(p["prediction"], answers[p["question_id"]])}
        for p in predictions
    ]
    total = 100.0 * mean(row["score"] for row in rows)
    return Scores(total, "percent", rows, details={"score_unrounded": total, "score_printed": two_decimals(total)})


def any_answer_accuracy(predictions: Sequence[Record], answers: Mapping[Any, Sequence[str]]) -> Scores:
    """Share of predictions that equal one of the answers once both are normalised (ST-VQA), as a fraction."""
    rows = []
    for record in predictions:
        accepted = {_cached_normalise(answer) for answer in answers[record["question_id"]]}
        right = _cached_normalise(record["prediction"]) in accepted
        rows.append({"question_id": record["question_id"], "score": 1.0 if right else 0.0})
    return Scores(mean(row["score"] for row in rows), "fraction", rows)


def normalised_answers(predictions: Sequence[Record], question_ids: Sequence[Any] | None = None) -> Scores:
    """The answers of a submission to the VQA servers (VQAv2, VizWiz), which alone can score it.

    Args:
        question_ids: those of the split, in order; one without a prediction gets the empty answer. None: those predicted.
    """
    texts = {record["question_id"]: record["prediction"] for record in predictions}
    ids = list(texts) if question_ids is None else question_ids
    rows = [{"question_id": i, "answer": _cached_normalise(texts.get(i, ""))} for i in ids]
    return Scores(None, "submission", rows)
