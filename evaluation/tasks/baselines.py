"""What guessing reaches, and what giving always the same answer does."""

from collections import Counter
from collections.abc import Callable, Sequence

from ..metrics.mme import COGNITION, PERCEPTION
from .item import Item
from .task import Task


def one_of_options(unit: float = 100.0) -> Callable[[Sequence[Item]], float]:
    """Guessing among each item's options: the mean of 1/n."""
    return lambda items: unit * sum(1 / len(item.options) for item in items) / len(items)


def coin(unit: float = 100.0) -> Callable[[Sequence[Item]], float]:
    """Guessing yes or no."""
    return lambda items: unit / 2


def coins_of_mme(items: Sequence[Item]) -> float:
    """Guessing on MME: 50 points of questions and 25 of pictures per category."""
    present = {item.category for item in items}
    return 75.0 * len(present & {*PERCEPTION, *COGNITION})


def most_frequent_answer(items: Sequence[Item]) -> str | None:
    """The answer that fits most items, as a model would write it; None where answers are no texts."""
    counts: Counter[str] = Counter()
    for item in items:
        answers = [item.answer] if isinstance(item.answer, str) else item.answer
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            return None
        counts.update(dict.fromkeys(answers, 1))
    return counts.most_common(1)[0][0] if counts else None


def majority_score(task: Task, items: Sequence[Item]) -> float | None:
    """The score of one and the same answer to everything, the most frequent one."""
    answer = most_frequent_answer(items)
    if answer is None or task.score is None:
        return None
    return task.score(items, {item.id: answer for item in items}).score
