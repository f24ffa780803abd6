"""From predictions to results: joins, scores, adds intervals and baselines, and writes what came out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .judge import Ask, judged_scores, judgement_of
from .metrics.scores import Scores
from .noise.intervals import Additive, additive, interval
from .running.predictions import PredictionStore
from .running.runner import PREDICTIONS, PlannedTask
from .submissions import write_submission
from .task_result import TaskResult
from .tasks.baselines import majority_score
from .tasks.item import Item
from .tasks.task import Task, Texts
from .writable_text import json_text

RESULTS_FILE = "results.json"
SCORES, SUBMISSIONS, JUDGEMENTS = "scores", "submissions", "judgements"
# From a row's score to the total, where the total is the mean.
_SCALES = {"percent": 100.0, "fraction": 1.0, "CIDEr x 100": 100.0, "points": 1.0}


def score_run(planned: Sequence[PlannedTask], out: Path, ask: Ask | None = None) -> list[TaskResult]:
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


def _score_task(plan: PlannedTask, out: Path, ask: Ask | None) -> TaskResult:
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


def _scores(task: Task, items: list[Item], texts: Texts, out: Path, ask: Ask | None) -> Scores:
    if task.score is not None:
        return task.score(items, texts) if items else Scores(None, "", [])
    if task.scored_by == "judge" and ask is not None:
        return _judged(task, items, texts, out, ask)
    return Scores(None, "", [])


def _judged(task: Task, items: list[Item], texts: Texts, out: Path, ask: Ask) -> Scores:
    """Scores by the judge, who is asked only about texts that it has not judged in an earlier attempt."""
    store = PredictionStore(out / JUDGEMENTS, task.name)
    known = store.read()
    for item in items:
        if known.get(item.id, {}).get("prediction") != texts[item.id]:
            known[item.id] = {**judgement_of(item, texts[item.id], ask), "prediction": texts[item.id]}
            store.append([known[item.id]])
    store.join([item.id for item in items])
    return judged_scores(items, known)


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
    result.lower_is_better = task.lower_is_better
    if not task.lower_is_better:
        result.majority = majority_score(task, items)
    if result.unit in ("percent", "fraction") and not result.lower_is_better:
        result.best = _SCALES[result.unit]
    elif result.unit == "points":  # MME: 100 for the questions and 100 for the pictures of a category
        result.best = 200.0 * len({item.category for item in items})


def _write_rows(file: Path, items: Sequence[Item], scores: Scores) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    of = {item.id: item for item in items}
    with file.open("w", encoding="utf-8") as stream:
        for row in scores.per_sample:
            item = of[row["question_id"]]
            gold = item.answer if isinstance(item.answer, str) else None
            line = {**row, "cluster": item.cluster_key, "category": item.category, "gold": gold}
            stream.write(json_text(line) + "\n")
