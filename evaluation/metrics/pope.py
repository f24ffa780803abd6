"""POPE: is an object in the picture? Mean F1 of three ways to choose the objects."""

from collections.abc import Mapping, Sequence
from typing import Any

from .scores import Record, Scores, mean

_NO_WORDS = {"No", "not", "no"}


def parse_yes_no(text: str) -> str:
    """ "no" if the first sentence has a word No, not or no in exactly this form, else "yes"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if _NO_WORDS.intersection(words) else "yes"


def yes_no_scores(answers: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 (of yes) and yes ratio as fractions, and the four counts.

    Where the original divides by zero (nothing said or labelled yes) the ratio is 0 here.
    """
    pairs = [(answer == "no", label == "no") for answer, label in zip(answers, labels, strict=True)]
    true_yes, false_yes = pairs.count((False, False)), pairs.count((False, True))
    true_no, false_no = pairs.count((True, True)), pairs.count((True, False))
    precision = _ratio(true_yes, true_yes + false_yes)
    recall = _ratio(true_yes, true_yes + false_no)
    return {
        "Accuracy": _ratio(true_yes + true_no, len(pairs)),
        "Precision": precision,
        "Recall": recall,
        "F1 score": _ratio(2 * precision * recall, precision + recall),
        "Yes ratio": _ratio(true_yes + false_yes, len(pairs)),
        "tp_fp_tn_fn": [true_yes, false_yes, true_no, false_no],
    }


def pope(labels: Mapping[str, Sequence[str]], predictions: Mapping[str, Sequence[Record]]) -> Scores:
    """Mean of the categories' F1, as a fraction. Labels and predictions are joined by their places in a category.

    Args:
        labels: category -> labels in the order of the official file; whatever is not "no" is yes.
        predictions: category -> `question_id` and `prediction`, in the same order.
    """
    rows, per_category, lower_case = [], {}, {}
    for category, records in predictions.items():
        wanted = labels[category]
        answers = [parse_yes_no(record["prediction"]) for record in records]
        per_category[category] = yes_no_scores(answers, wanted)
        for record, answer, label in zip(records, answers, wanted, strict=True):
            score = int((answer == "no") == (label == "no"))
            rows.append({"question_id": record["question_id"], "parsed": answer, "score": score})
        by_id = sorted(records, key=lambda record: record["question_id"])
        lower_case[category] = yes_no_scores([parse_yes_no(record["prediction"].lower()) for record in by_id], wanted)
    variant = {"per_category": lower_case, "average_f1": mean(row["F1 score"] for row in lower_case.values())}
    details = {"metric": "average F1 over the three categories", "variants": {"lower_case_first": variant}}
    total = mean(row["F1 score"] for row in per_category.values())
    return Scores(total, "fraction", rows, per_category, details)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
