"""AI2D: diagrams with four options; a letter is made of the first character of whatever is left of the text."""

from collections.abc import Sequence

from .scores import Record, Scores, percent, texts_by_id

_MARKERS = ("answer is", "answer is:", "answer:", "assistant:")
_INDEX_OF_LETTER = {"a": "0", "b": "1", "c": "2", "d": "3"}


def extract_character(text: str) -> str:
    """The character that stands for the answer; "" if nothing is left. A word that begins with a..d is a letter."""
    text = text.lower().strip()
    for marker in _MARKERS:
        text = text.rpartition(marker)[2]
    text = text.strip().rstrip(".:,").lstrip("(").rstrip(")")
    return text[:1]


def ai2d(gold: Sequence[Record], predictions: Sequence[Record]) -> Scores:
    """Accuracy in percent; without any prediction an item is wrong.

    Args:
        gold: `question_id` and `gt_answer`, the index of the right option as text.
        predictions: `question_id` and `prediction`.
    """
    texts = texts_by_id(predictions)
    rows = []
    for item in gold:
        parsed = extract_character(texts.get(item["question_id"], ""))
        right = _INDEX_OF_LETTER.get(parsed, parsed) == item["gt_answer"]
        rows.append({"question_id": item["question_id"], "parsed": parsed, "score": int(right)})
    # An empty text is found at 0, as in the original; one that is not there is not.
    found = [
        item["question_id"] in texts and str("ABCDE".find(texts[item["question_id"]])) == item["gt_answer"]
        for item in gold
    ]
    return Scores(
        percent(row["score"] for row in rows),
        "percent",
        rows,
        details={"correct": sum(row["score"] for row in rows), "variants": {"find_in_ABCDE": percent(found)}},
    )
