"""CMMMU: MMMU's Chinese relative, from files of final answers and from raw responses."""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .key_phrases import answer_tails, any_candidate_fits, as_number, numbers_in
from .scores import Record, Scores, mean

# In the order in which the original scores them, which is also the order of its random draws.
DISCIPLINES = {
    "艺术与设计": "Art & Design",
    "商业": "Business",
    "科学": "Science",
    "健康与医学": "Health & Medicine",
    "人文社会科学": "Humanities & Social Sciences",
    "技术与工程": "Technology & Engineering",
}
CHOICE, FILL_IN, TRUE_FALSE = "选择", "填空", "判断"
_LETTERS = "ABCD"
_END_MARKS = ",.!?;:'"
_FULL_STOP, _THOUSANDS = "。", "\uff0c"
_SEED = 42
_EXTRA_CHARACTERS, _EXTRA_LETTERS = 20, 2  # by how much a text may outgrow the answer
_FILL_IN_INDICATORS = ("是", "为", "所以", "等于", "方案", "选择", "正确答案", "因此", "最后", "答案", "结果")
_TRUE_FALSE_INDICATORS = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
_TRUE, _FALSE = "对", "错"
# Containment makes the negated forms positive: 不对 has 对 in it.
_POSITIVE = ("正确", "对", "准确", "肯定")
_NEGATIVE = ("错", "不合适", "否定")
_AMBIGUOUS = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
# What an answer is worth: right or not, and whether it was drawn.
Verdict = tuple[bool, bool]


def cmmmu_answers(gold: Sequence[Record], predictions: Mapping[int, str]) -> Scores:
    """Accuracy as a fraction of final answers; arguments as of `cmmmu_responses`."""

    def judge(item: Record, text: str) -> Verdict:
        if item["type"] == FILL_IN:
            return _fits([text], item["answer"]), False
        return text == item["answer"], False

    return _scores(gold, predictions, judge)


def cmmmu_responses(gold: Sequence[Record], predictions: Mapping[int, str]) -> Scores:
    """Accuracy as a fraction of raw responses. Where a response names nothing the original draws, with seed 42.

    Args:
        gold: `id`, `type`, `answer`, `category` and `option1` to `option4` of the official file.
        predictions: id -> text; a missing one is wrong.
    """
    draws = random.Random(_SEED)

    def judge(item: Record, text: str) -> Verdict:
        if item["type"] == CHOICE:
            letters = parse_choice(text, [item[f"option{i}"] for i in range(1, len(_LETTERS) + 1)])
            chosen = draws.choice(list(_LETTERS)) if letters is None else letters
            return chosen == item["answer"], letters is None
        if item["type"] == FILL_IN:
            return _fits(_fill_in_candidates(text), item["answer"]), False
        said = parse_true_false(text)
        return (draws.choice([_TRUE, _FALSE]) if said is None else said) == item["answer"], said is None

    return _scores(gold, predictions, judge)


def parse_choice(text: str, options: Sequence[str]) -> str | None:
    """The letters that a response names most often; None if it names none, "" if it is empty."""
    if text == "":
        return ""
    for mark in _END_MARKS:
        text = text.strip(mark)
    text = f" {text} "
    forms = ([f"({letter})" for letter in _LETTERS], list(_LETTERS), list(options))
    for form in forms:
        counts = [text.count(written) if written else 0 for written in form]
        if any(counts):
            return "".join(letter for letter, n in zip(_LETTERS, counts, strict=False) if n == max(counts))
    return None


def parse_true_false(text: str) -> str | None:
    """对 or 错, by the majority of the phrases that say either; None on a tie."""
    candidates = [c for c in _candidates(text, _TRUE_FALSE_INDICATORS) if not any(word in c for word in _AMBIGUOUS)]
    balance = 0
    for candidate in candidates:
        if any(word in candidate for word in _POSITIVE):
            balance += 1
        elif any(word in candidate for word in _NEGATIVE):
            balance -= 1
    return None if balance == 0 else _TRUE if balance > 0 else _FALSE


def _candidates(text: str, indicators: Sequence[str]) -> list[str]:
    text = text.strip(_FULL_STOP).strip()
    return answer_tails(re.split(f"{_FULL_STOP}|\n", text), indicators) or [text]


def _fill_in_candidates(text: str) -> list[str]:
    tails = _candidates(text, _FILL_IN_INDICATORS)
    return [*tails, *(number for tail in tails for number in numbers_in(tail, _THOUSANDS, ends_at_word=False))]


def _fits(texts: Sequence[str], answer: str) -> bool:
    candidates = [form for text in texts for form in _normalised(text, answer)]
    return any_candidate_fits(candidates, _normalised(answer, answer))


def _normalised(text: str, answer: str) -> list[str | float]:
    """The number or the text; nothing if the text is much longer than the answer, or has more Latin letters."""
    text = text.strip()
    number = as_number(text)
    if number is not None:
        return [number]
    is_long = len(text) > len(answer) + _EXTRA_CHARACTERS
    return [] if is_long or _latin_letters(text) > _latin_letters(answer) + _EXTRA_LETTERS else [text]


def _latin_letters(text: str) -> int:
    return len(re.findall("[a-zA-Z]", text))


def _scores(gold: Sequence[Record], predictions: Mapping[int, str], judge: Any) -> Scores:
    verdicts: dict[int, Verdict] = {}
    for discipline in DISCIPLINES:  # one stream of random draws over all of them
        for item in gold:
            if item["category"] == discipline:
                text = predictions.get(item["id"])
                verdicts[item["id"]] = (False, False) if text is None else judge(item, text)
    rows = [{"question_id": i["id"], "score": int(verdicts[i["id"]][0]), "random": verdicts[i["id"]][1]} for i in gold]
    counts = Counter(item["category"] for item in gold)
    right = Counter(item["category"] for item in gold if verdicts[item["id"]][0])
    per_category = {
        name: {"correct": right[key], "count": counts[key], "acc": right[key] / counts[key]}
        for key, name in DISCIPLINES.items()
        if counts[key]
    }
    every = [row["score"] for row in rows]
    details = {
        "correct": sum(every),
        "count": len(every),
        "score_without_random": mean(row["score"] for row in rows if not row["random"]),
        "random_items": sum(row["random"] for row in rows),
    }
    return Scores(mean(every), "fraction", rows, per_category, details)
