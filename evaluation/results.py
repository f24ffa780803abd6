"""Scores of a run with everything one needs to trust them: interval, n, chance, majority, failures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .judge import judge_items, judged_scores
from .metrics.scores import Scores
from .noise.intervals import Additive, additive, interval
from .running.predictions import PredictionStore
from .running.runner import PREDICTIONS, PlannedTask
from .submissions import write_submission
from .tasks.baselines import majority_score
from .tasks.item import Item
from .tasks.task import Task

RESULTS_FILE = "results.json"
SCORES, SUBMISSIONS, JUDGEMENTS = "scores", "submissions", "judgements"
# From a row's score to the total, where the total is the mean.
_SCALES = {"percent": 100.0, "fraction": 1.0, "CIDEr x 100": 100.0, "points": 1.0}


@dataclass
class TaskResult:
    """The result of one task.

    Fields:
        score: None where a server or a judge has yet to compute it; `low` and `high` are the 95 % interval.
        n: items scored; `clusters`: how many of them are independent; `failed`: items that could not be answered, which
            are not in the score; `left_out`: answered but without a score (random choices, unreadable judgements).
        chance, majority: what guessing and always giving the most frequent answer reach, in the same unit.
        best: the best possible score; None where there is no such thing.
        submission: the file for a server or an external grader.
    """

    name: str
    title: str
    modality: str
    split: str
    scored_by: str
    unit: str
    score: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int
    failed: int
    left_out: int
    chance: float | None = None
    majority: float | None = None
    best: float | None = None
    lower_is_better: bool = False
    submission: str | None = None
    per_category: dict[str, Any] = field(default_factory=dict)
    replicates: np.ndarray | None = None

    @property
    def base(self) -> float:
        """What is had for nothing."""
        return next((value for value in (self.chance, self.majority) if value is not None), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {name: value for name, value in asdict(self).items() if name != "replicates"}


def score_run(planned: Sequence[PlannedTask], out: Path, ask: Callable[[str], str] | None = None) -> list[TaskResult]:
    """Join the predictions, score them, write scores, submissions and results.json.

    Args:
        ask: the judge, for the tasks that need one; without it these get their predictions and files only.
    """
    results = [_score_task(plan, out, ask) for plan in planned]
    known = {result["name"]: result for result in read_results(out)} if (out / RESULTS_FILE).is_file() else {}
    known |= {result.name: result.to_dict() for result in results}
    content = json.dumps({"tasks": list(known.values())}, indent=1, ensure_ascii=False)
    (out / RESULTS_FILE).write_text(content, encoding="utf-8")
    return results


def read_results(out: Path) -> list[dict[str, Any]]:
    """What `score_run` wrote.

    Raises:
        DataError: there is nothing, or it is damaged.
    """
    file = out / RESULTS_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} cannot be read ({error}): is {out} the --out of an evaluation?") from error


def _score_task(plan: PlannedTask, out: Path, ask: Callable[[str], str] | None) -> TaskResult:
    task = plan.task
    predictions = PredictionStore(out / PREDICTIONS, task.name).join([item.id for item in plan.items])
    texts = {key: record["prediction"] for key, record in predictions.items() if "prediction" in record}
    answered = [item for item in plan.items if item.id in texts]
    submission = None
    if task.submission:
        submission = str(
            write_submission(task.submission, plan.items, texts, out / SUBMISSIONS, task.name).relative_to(out)
        )
    scores = _scores(task, answered, texts, out, ask)
    result = TaskResult(
        task.name, task.title, task.modality, task.split, task.scored_by, scores.unit, scores.score, None, None,
        n=0, clusters=0, failed=len(plan.items) - len(answered), left_out=0, submission=submission,
        per_category=scores.per_category,
    )  # fmt: skip
    if scores.score is not None and answered:
        _add_interval(result, task, answered, scores)
        _add_baselines(result, task, answered)
        _write_rows(out / SCORES / f"{task.name}.jsonl", answered, scores)
    return result


def _scores(task: Task, items: list[Item], texts: Mapping[Any, str], out: Path, ask: Any) -> Scores:
    if task.score is not None:
        return task.score(items, texts) if items else Scores(None, "", [])
    if task.scored_by == "judge" and ask is not None:
        store = PredictionStore(out / JUDGEMENTS, task.name)
        known = store.read()
        for item in items:
            # A judgement is of one text; another text is judged anew.
            if known.get(item.id, {}).get("prediction") != texts[item.id]:
                judgement = {**judge_items([item], texts, ask)[0], "prediction": texts[item.id]}
                store.append([judgement])
                known[item.id] = judgement
        store.join([item.id for item in items])
        return judged_scores(items, known)
    return Scores(None, "", [])


def sums_of(task: Task, items: Sequence[Item], rows: Sequence[Mapping[str, Any]], unit: str) -> Additive:
    """The additive form of a task's scores, for intervals and comparisons."""
    by_id = {row["question_id"]: row for row in rows}
    return additive(items, [by_id[item.id] for item in items], task.statistic, _SCALES[unit])


def _add_interval(result: TaskResult, task: Task, items: Sequence[Item], scores: Scores) -> None:
    data = sums_of(task, items, scores.per_sample, scores.unit)
    result.n = sum(row["score"] is not None for row in scores.per_sample)
    result.left_out = len(items) - result.n
    result.clusters = len(data.keys)
    if data.keys:
        result.replicates = data.replicates()
        result.low, result.high = interval(data, result.replicates, _SCALES[scores.unit])


def _add_baselines(result: TaskResult, task: Task, items: Sequence[Item]) -> None:
    result.chance = task.chance(items) if task.chance else None
    if "WER" not in result.per_category:  # no single transcript is a fair guess
        result.majority = majority_score(task, items)
    result.lower_is_better = "WER" in result.per_category
    if result.unit in ("percent", "fraction") and not result.lower_is_better:
        result.best = _SCALES[result.unit]
    elif result.unit == "points":
        result.best = 200.0 * len({item.category for item in items})


def _write_rows(file: Path, items: Sequence[Item], scores: Scores) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    of = {item.id: item for item in items}
    with file.open("w", encoding="utf-8") as stream:
        for row in scores.per_sample:
            item = of[row["question_id"]]
            gold = item.answer if isinstance(item.answer, str) else None
            line = {**row, "cluster": item.cluster_key, "category": item.category, "gold": gold}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
