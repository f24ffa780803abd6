"""ChartQA: relaxed accuracy. Numbers may be off by 5 % of the right one, other answers must be equal."""

from collections.abc import Sequence

from .scores import Record, Scores, first_of, percent, texts_by_id

_TOLERANCE = 0.05


def is_relaxed_match(prediction: str, answer: str) -> bool:
    """Whether both are numbers for Python and close, or else the same text in lower case.

    Units, "%" and thousands commas make a text of a number, and years are numbers too: 1950 is right for 2000.
    """
    prediction, answer = prediction.lower(), answer.lower()
    try:
        given, wanted = float(prediction), float(answer)
    except ValueError:
        return prediction == answer
    return abs(given - wanted) <= _TOLERANCE * abs(wanted)


def chartqa(gold: Sequence[Record], predictions: Sequence[Record]) -> Scores:
    """Relaxed accuracy in percent, in all and per `type`.

    Args:
        gold: `question_id`, `gt_answer` and `type` ("human" or "augmented").
        predictions: `question_id` and `prediction`.
    """
    texts = texts_by_id(predictions)
    rows = [
        {
            "question_id": item["question_id"],
            "score": int(is_relaxed_match(texts.get(item["question_id"], ""), item["gt_answer"])),
        }
        for item in gold
    ]
    per_type = {
        kind: percent(row["score"] for row, item in zip(rows, gold, strict=True) if item["type"] == kind)
        for kind in first_of(gold, "type")
    }
    right = [row["score"] for row in rows]
    return Scores(percent(right), "percent", rows, per_type, {"correct": sum(right)})
