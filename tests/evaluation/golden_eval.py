"""Golden evaluation data: predictions, gold answers, and the scores that the original scorers gave them.

A case is a folder with `expected.json` and `predictions.jsonl`; its name, or that of a folder around it, holds the name
of its benchmark ("textvqa", "textvqa-2", "held2_textvqa", "pope/seed7"). Question files are in a folder `questions`
anywhere below the root.

Environment:
    UNIMOE_GOLDEN_EVAL   the folder of cases; default: ../shared/golden-eval next to the repository. Question files that
                         it lacks are taken from there too.
    CI=true              a folder that is missing fails the tests instead of skipping them
"""

import functools
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unimoe.evaluation.metrics import (
    ai2d,
    anls,
    chartqa,
    cmmmu,
    gqa,
    hallusionbench,
    mme,
    mmmu,
    pope,
    qbench,
    scienceqa,
    seedbench,
    soft_accuracy,
)
from unimoe.evaluation.metrics.scores import Scores

VARIABLE = "UNIMOE_GOLDEN_EVAL"
# Sums may be added up in another order than the original's; nothing else may differ.
RELATIVE_TOLERANCE = 1e-12


def default_root() -> Path:
    return Path(__file__).resolve().parents[3] / "shared" / "golden-eval"


def golden_eval_root() -> Path:
    return Path(os.environ.get(VARIABLE) or default_root())


def cases() -> list[Path]:
    """Every folder of the root that holds a case, whatever its name."""
    root = golden_eval_root()
    return sorted(file.parent for file in root.rglob("expected.json")) if root.is_dir() else []


def benchmark_of(case: Path) -> str:
    """The longest name of a benchmark in a case's name, else in that of a folder around it.

    No letter may stand before it: "held-cmmmu" is no case of mmmu.
    """
    for name in (case.name, *(parent.name for parent in case.relative_to(golden_eval_root()).parents)):
        known = [benchmark for benchmark in SCORERS if re.search(rf"(?<![a-z]){benchmark}", name.lower())]
        if known:
            return max(known, key=len)
    raise AssertionError(
        f"{case}: neither its name nor that of a folder around it has the name of a benchmark with a scorer. Known are "
        f"{', '.join(sorted(SCORERS))}; rename the folder, or add a scorer to SCORERS in {Path(__file__).name}."
    )


def score_case(case: Path) -> dict[str, Any]:
    """What our metric gives the case's predictions, as the original prints it."""
    scores = vars(SCORERS[benchmark_of(case)](case))
    return {**scores, **scores["details"]}


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Every place where `found` lacks something of `expected`, or differs from it."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if not isinstance(found, dict) or key not in found:
                yield f"{where}/{key} is missing"
            else:
                yield from differences(value, found[key], f"{where}/{key}")
    elif isinstance(expected, list):
        expected, found = in_one_order(expected, found)
        if not isinstance(found, list) or len(found) != len(expected):
            yield f"{where}: {len(expected)} entries expected"
        else:
            for number, (left, right) in enumerate(zip(expected, found, strict=True)):
                yield from differences(left, right, f"{where}/{number}")
    elif isinstance(expected, float) and isinstance(found, int | float):
        if not math.isclose(expected, found, rel_tol=RELATIVE_TOLERANCE, abs_tol=0.0):
            yield f"{where}: expected {expected!r}, found {found!r}"
    elif expected != found:
        yield f"{where}: expected {expected!r}, found {found!r}"


def in_one_order(expected: list[Any], found: Any) -> tuple[list[Any], Any]:
    """Two lists of samples, each sorted by its question; other lists as they are."""

    def key(row: dict[str, Any]) -> tuple[str, str]:
        return str(row["question_id"]), row.get("question", "")

    lists = (expected, found) if isinstance(found, list) else (expected,)
    if not all(isinstance(row, dict) and "question_id" in row for rows in lists for row in rows):
        return expected, found
    return sorted(expected, key=key), sorted(found, key=key) if isinstance(found, list) else found


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def predictions_of(case: Path) -> list[dict[str, Any]]:
    return json_lines(case / "predictions.jsonl")


def texts_of(case: Path) -> dict[Any, str]:
    return {record["question_id"]: record["prediction"] for record in predictions_of(case)}


def question_file(name: str) -> Path:
    roots = (golden_eval_root(), default_root())
    found = [file for root in roots for file in sorted(root.rglob(f"questions/{name}"))]
    return found[0] if found else roots[0] / "questions" / name


@functools.cache
def question_json(name: str) -> Any:
    return json.loads(question_file(name).read_text(encoding="utf-8"))


@functools.cache
def gqa_questions() -> dict[str, Any]:
    with tarfile.open(question_file("testdev_balanced_questions.tar.gz")) as archive:
        return json.load(archive.extractfile(archive.getmembers()[0]))


def textvqa(case: Path) -> Scores:
    answers = {item["question_id"]: item["answers"] for item in question_json("TextVQA_0.5.1_val.json")["data"]}
    scores = soft_accuracy.soft_accuracy(predictions_of(case), answers)
    return Scores(scores.details["score_printed"], scores.unit, scores.per_sample, {}, scores.details)


def aokvqa(case: Path) -> Scores:
    answers = {item["question_id"]: item["gt"] for item in question_json("aokvqa.json")}
    return soft_accuracy.soft_accuracy(predictions_of(case), answers)


def stvqa(case: Path) -> Scores:
    answers = {item["question_id"]: item["answers"] for item in json_lines(case / "gold.jsonl")}
    return soft_accuracy.any_answer_accuracy(predictions_of(case), answers)


def vqav2(case: Path) -> Scores:
    ids = [record["question_id"] for record in json_lines(case / "split_ids.jsonl")]
    return soft_accuracy.normalised_answers(predictions_of(case), ids)


def document_questions(case: Path) -> Scores:
    questions = json.loads((case / "gold.json").read_text(encoding="utf-8"))["data"]
    return anls.anls(questions, texts_of(case))


def cmmmu_case(case: Path) -> Scores:
    gold = json_lines(question_file("cmmmu-data-val-answer.jsonl"))
    metric = cmmmu.cmmmu_responses if benchmark_of(case) == "cmmmu_response" else cmmmu.cmmmu_answers
    return metric(gold, texts_of(case))


def gqa_case(case: Path) -> Scores:
    texts = texts_of(case)
    return gqa.gqa({key: gqa_questions()[key] for key in texts}, texts)


def mme_case(case: Path) -> Scores:
    gold = {}
    for file in sorted((case / "gold").glob("*.txt")):
        for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
            name, question, answer = line.split("\t")[:3]
            gold[file.stem, name.partition(".")[0], question] = answer
    return mme.mme(gold, predictions_of(case))


def mmmu_case(case: Path) -> Scores:
    texts = texts_of(case)
    gold = question_json("mmmu_answer_dict_val.json")
    ours = mmmu.mmmu({key: item for key, item in gold.items() if key in texts}, texts)
    order = {row["question_id"]: row for row in ours.per_sample}
    return Scores(ours.score, ours.unit, [order[key] for key in texts], ours.per_category, ours.details)


def pope_case(case: Path) -> Scores:
    prefix = "coco_pope_"
    gold = {file.stem.removeprefix(prefix): json_lines(file) for file in (case / "gold").glob(f"{prefix}*.json")}
    category_of = {item["question_id"]: category for category, items in gold.items() for item in items}
    predictions: dict[str, list[Any]] = {}
    for record in predictions_of(case):
        predictions.setdefault(category_of[record["question_id"]], []).append(record)
    return pope.pope({name: [item["label"] for item in items] for name, items in gold.items()}, predictions)


def seedbench_case(case: Path) -> Scores:
    official = json.loads((case / "gold.json").read_text(encoding="utf-8"))
    return seedbench.seedbench(official["questions"], official["question_type"], predictions_of(case))


def from_gold_lines(metric: Callable[..., Scores]) -> Callable[[Path], Scores]:
    return lambda case: metric(json_lines(case / "gold.jsonl"), predictions_of(case))


SCORERS: dict[str, Callable[[Path], Scores]] = {
    "ai2d": from_gold_lines(ai2d.ai2d),
    "aokvqa": aokvqa,
    "chartqa": from_gold_lines(chartqa.chartqa),
    "cmmmu_answer": cmmmu_case,
    "cmmmu_response": cmmmu_case,
    "docvqa": document_questions,
    "evalai_normaliser": lambda case: soft_accuracy.normalised_answers(predictions_of(case)),
    "gqa": gqa_case,
    "hallusionbench": from_gold_lines(hallusionbench.hallusionbench),
    "infographicvqa": document_questions,
    "mme": mme_case,
    "mmmu": mmmu_case,
    "mmmu_parse": from_gold_lines(mmmu.mmmu_letters),
    "pope": pope_case,
    "qbench": from_gold_lines(qbench.qbench),
    "scienceqa": from_gold_lines(scienceqa.scienceqa),
    "seedbench": seedbench_case,
    "stvqa": stvqa,
    "textvqa": textvqa,
    "vqav2": vqav2,
}
