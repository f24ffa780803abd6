"""Multiple choice where a benchmark has no scorer of its own: MMBench's letters, spoken questions, exams."""

from collections.abc import Mapping, Sequence

from .mmmu import parse_letter
from .scores import Record, Scores, percent


def option_letters(gold: Sequence[Record], predictions: Mapping[object, str]) -> Scores:
    """Accuracy in percent with MMMU's rule for letters in free text; a text that names no option is wrong.

    Args:
        gold: `question_id`, `options` (texts; as many as there are letters), `answer` (letter), `category`.
        predictions: id -> text.
    """
    rows = []
    groups: dict[str, list[int]] = {}
    for item in gold:
        parsed = parse_letter(predictions[item["question_id"]].strip(), item["options"])
        score = int(parsed == item["answer"])
        rows.append({"question_id": item["question_id"], "parsed": parsed, "score": score})
        groups.setdefault(item["category"], []).append(score)
    named = {name: percent(scores) for name, scores in groups.items()} if len(groups) > 1 else {}
    return Scores(percent(row["score"] for row in rows), "percent", rows, named)
