"""HallusionBench: accuracy per question (aAcc) by the first word; no judge."""

from collections.abc import Sequence

from .scores import Record, Scores, first_of, percent, texts_by_id


def first_word(text: str) -> str:
    """The first word in lower case without the full stops, colons and commas at its end; "" if there is none."""
    words = text.lower().split()
    return words[0].rstrip(".:,") if words else ""


def hallusionbench(gold: Sequence[Record], predictions: Sequence[Record]) -> Scores:
    """Share of right first words in percent, in all and per `category`.

    Args:
        gold: `question_id`, `gt_answer` ("Yes" or "No") and `category` ("VD" or "VS").
        predictions: `question_id` and `prediction`.
    """
    texts = texts_by_id(predictions)
    rows = [
        {
            "question_id": item["question_id"],
            "score": int(first_word(texts.get(item["question_id"], "")) == item["gt_answer"].lower()),
        }
        for item in gold
    ]
    per_category = {
        name: percent(row["score"] for row, item in zip(rows, gold, strict=True) if item["category"] == name)
        for name in first_of(gold, "category")
    }
    right = [row["score"] for row in rows]
    return Scores(percent(right), "percent", rows, per_category, {"correct": sum(right)})
