"""MoAI's copies of the normaliser, MME and POPE against what they returned."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from unimoe.evaluation.metrics import mme, pope
from unimoe.evaluation.metrics.evalai_answers import normalise_answer
from unimoe.evaluation.metrics.soft_accuracy import soft_accuracy_of

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_ROOT = REPOSITORY.parent / "shared" / "golden"
ROOT = Path(os.environ.get("UNIMOE_GOLDEN") or DEFAULT_ROOT)


def each(section: str) -> pytest.MarkDecorator:
    """Runs a test once per `evaluation.json`, anywhere below the root, that holds a section."""
    found = []
    for file in sorted(ROOT.rglob("evaluation.json")) if ROOT.is_dir() else ():
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and section in data:
            found.append(pytest.param(data[section], id=str(file.parent.relative_to(ROOT))))
    return pytest.mark.parametrize("golden", found or [None], ids=None if found else ["no-golden-data"], indirect=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Any:
    """One section of one file. Without any, the test is skipped, or fails in CI, where the default folder has all."""
    if request.param is None:
        is_due = os.environ.get("CI", "").lower() == "true" and (
            ROOT.resolve() == DEFAULT_ROOT.resolve() or not ROOT.is_dir()
        )
        (pytest.fail if is_due else pytest.skip)(f"no evaluation.json under {ROOT} holds what this test compares")
    return request.param


@each("textvqa_normalise")
def test_normaliser(golden: list[dict[str, Any]]) -> None:
    assert [normalise_answer(row["raw"]) for row in golden] == [row["processed"] for row in golden]


@each("textvqa_score")
def test_soft_accuracy(golden: list[dict[str, Any]]) -> None:
    assert [soft_accuracy_of(row["pred"], row["gts"]) for row in golden] == [row["accuracy"] for row in golden]


@each("mme_parse")
def test_yes_or_no_of_mme(golden: list[dict[str, Any]]) -> None:
    assert [mme.parse_yes_no(row["lower_input"]) for row in golden] == [row["label"] for row in golden]


@each("mme_total")
def test_totals_of_mme(golden: dict[str, Any]) -> None:
    gold, predictions = {}, []
    for category, lines in golden["lines"].items():
        for file, question, answer, text in lines:
            gold[category, file.partition(".")[0], f"{question} {mme.INSTRUCTION}"] = answer
            predictions.append({"question_id": f"{category}/{file}", "question": question, "prediction": text})
    points = mme.mme(gold, predictions).per_category
    printed = ""
    for title, names in (("Perception", mme.PERCEPTION), ("Cognition", mme.COGNITION)):
        rows = "".join(f"\t {name}  score: {points[name]}\n" for name in names)
        printed += f"=========== {title} ===========\ntotal score: {points[title]} \n\n{rows}\n\n"
    assert printed == golden["printed"]


@each("pope")
def test_pope(golden: dict[str, Any]) -> None:
    parsed = [pope.parse_yes_no(text) for text in golden["raw"]]
    assert parsed == golden["parsed"]
    scores = pope.yes_no_scores(parsed, golden["labels"])
    names = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")
    assert [scores[name] for name in names] == list(golden["metrics"].values())
    assert list(golden["metrics"]) == ["accuracy", "precision", "recall", "f1", "yes_ratio"]
