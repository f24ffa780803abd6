"""ScienceQA: letters, in three forms."""

import re
from collections.abc import Sequence

from .scores import Record, Scores, percent

FAILED = "FAILED"
_LETTERS = "ABCDE"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def extract_letter(text: str) -> str:
    """ "B", "B. ..." and "The answer is B." (or any other character behind the letter, once in the text); else FAILED."""
    if len(text) == 1 and text in _LETTERS:
        return text
    if text[:1] and text[0] in _LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def scienceqa(gold: Sequence[Record], predictions: Sequence[Record]) -> Scores:
    """Accuracy in percent over all items; one without a prediction is wrong, and counts as one without an image.

    Args:
        gold: `question_id`, `answer` (index), `num_choices` and `has_image`.
        predictions: `question_id` and `prediction`.
    """
    texts = {record["question_id"]: record["prediction"] for record in predictions}
    rows, of_images = [], []
    for item in gold:
        parsed = extract_letter(texts[item["question_id"]]) if item["question_id"] in texts else FAILED
        is_option = parsed in _LETTERS[: item["num_choices"]]
        score = int(is_option and _LETTERS.index(parsed) == item["answer"])
        rows.append({"question_id": item["question_id"], "parsed": parsed, "score": score})
        if item["has_image"] and item["question_id"] in texts:
            of_images.append(score)
    right = [row["score"] for row in rows]
    per_category = {
        "image_accuracy": percent(of_images),
        "correct": sum(right),
        "count": len(right),
        "image_correct": sum(of_images),
        "image_count": len(of_images),
    }
    return Scores(percent(right), "percent", rows, per_category)
