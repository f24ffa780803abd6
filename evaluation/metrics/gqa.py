"""GQA: exact answers, broken down by the structure of the question, and the distribution of answers."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from .scores import Record, Scores, percent

# An operation with one of these is not a step of reasoning.
_NO_STEPS = ("exist", "query: name", "choose name")


def convert_answer(text: str) -> str:
    """The text without full stops at its very end, in lower case."""
    return text.rstrip(".").lower()


def gqa(questions: Mapping[str, Record], predictions: Mapping[str, str]) -> Scores:
    """Accuracies in percent, and `distribution` (lower is better), over the questions given.

    Args:
        questions: id -> `question`, `answer`, `types`, `semantic` and `groups` of the official file.
        predictions: id -> text; a missing one is wrong.
    """
    answers = {key: convert_answer(predictions.get(key, "")) for key in questions}
    right = {key: int(answers[key] == question["answer"]) for key, question in questions.items()}
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for key, question in questions.items():
        structural = question["types"]["structural"]
        groups["openness"]["open" if structural == "query" else "binary"].append(right[key])
        groups["accuracyPerStructuralType"][structural].append(right[key])
        groups["accuracyPerSemanticType"][question["types"]["semantic"]].append(right[key])
        groups["accuracyPerSteps"][str(number_of_steps(question))].append(right[key])
        groups["accuracyPerLength"][str(len(question["question"].split()))].append(right[key])
    total = percent(right.values())
    per_category: dict[str, Any] = {name: percent(values) for name, values in groups.pop("openness").items()}
    per_category |= {"accuracy": total, "distribution": answer_distribution(questions, answers)}
    for section, members in groups.items():
        per_category[section] = {
            name: {"accuracy": percent(values), "count": len(values)} for name, values in members.items()
        }
    rows = [{"question_id": key, "score": score} for key, score in right.items()]
    return Scores(total, "percent", rows, per_category)


def number_of_steps(question: Record) -> int:
    """Operations of the question's program that are steps of reasoning."""
    steps = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(word in step for word in _NO_STEPS) for step in steps)


def answer_distribution(questions: Mapping[str, Record], answers: Mapping[str, str]) -> float:
    """Chi-square distance of the answers' frequencies from the right ones', per global group, weighted by its size."""
    wanted: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for key, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            wanted[group][question["answer"]] += 1
            given[group][answers[key]] += 1
    weighted, size = 0.0, 0
    for group, counts in wanted.items():
        distance = sum(float(given[group][answer] - count) ** 2 / count for answer, count in counts.items())
        weighted += distance * counts.total()
        size += counts.total()
    return weighted / size / 100 if size else 0.0
