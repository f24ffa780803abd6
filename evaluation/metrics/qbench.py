"""Q-Bench: the text's place in "ABCD" is the index of the chosen option."""

from collections.abc import Sequence

from .scores import Record, Scores, percent, texts_by_id


def qbench(gold: Sequence[Record], predictions: Sequence[Record]) -> Scores:
    """Accuracy in percent.

    A text that is not in "ABCD" has the index -1 and so stands for the last option; an empty one for the first. Without
    any prediction an item is wrong.

    Args:
        gold: `question_id`, `candidates` (texts of the options) and `correct_ans` (text of the right one).
        predictions: `question_id` and `prediction`.
    """
    texts = texts_by_id(predictions)
    rows = []
    for item in gold:
        text = texts.get(item["question_id"])
        rows.append({"question_id": item["question_id"], "score": int(text is not None and _is_right(text, item))})
    return Scores(percent(row["score"] for row in rows), "percent", rows)


def _is_right(text: str, item: Record) -> bool:
    index, candidates = "ABCD".find(text.strip()), item["candidates"]
    return index < len(candidates) and candidates[index].lower() == item["correct_ans"].lower()
