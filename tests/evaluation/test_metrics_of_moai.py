"""MoAI's copies of the normaliser, MME and POPE against what they returned."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from unimoe.evaluation.metrics import mme, pope
from unimoe.evaluation.metrics.evalai_answers import normalise_answer
from unimoe.evaluation.metrics.soft_accuracy import soft_accuracy_of

SECTIONS = {"textvqa_normalise", "textvqa_score", "mme_parse", "mme_total", "pope"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    repository = Path(__file__).resolve().parents[2]
    root = Path(os.environ.get("UNIMOE_GOLDEN") or repository.parent / "shared" / "golden")
    files = sorted(root.glob("*/evaluation.json"))
    if not files:
        (pytest.fail if os.environ.get("CI", "").lower() == "true" else pytest.skip)(f"{root} has no evaluation.json")
    merged: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    assert set(merged) == SECTIONS
    return merged


def test_normaliser(golden: dict[str, Any]) -> None:
    rows = golden["textvqa_normalise"]
    assert [normalise_answer(row["raw"]) for row in rows] == [row["processed"] for row in rows]


def test_soft_accuracy(golden: dict[str, Any]) -> None:
    rows = golden["textvqa_score"]
    assert [soft_accuracy_of(row["pred"], row["gts"]) for row in rows] == [row["accuracy"] for row in rows]


def test_yes_or_no_of_mme(golden: dict[str, Any]) -> None:
    rows = golden["mme_parse"]
    assert [mme.parse_yes_no(row["lower_input"]) for row in rows] == [row["label"] for row in rows]


def test_totals_of_mme(golden: dict[str, Any]) -> None:
    gold, predictions = {}, []
    for category, lines in golden["mme_total"]["lines"].items():
        for file, question, answer, text in lines:
            gold[category, file.partition(".")[0], f"{question} {mme.INSTRUCTION}"] = answer
            predictions.append({"question_id": f"{category}/{file}", "question": question, "prediction": text})
    points = mme.mme(gold, predictions).per_category
    printed = ""
    for title, names in (("Perception", mme.PERCEPTION), ("Cognition", mme.COGNITION)):
        rows = "".join(f"\t {name}  score: {points[name]}\n" for name in names)
        printed += f"=========== {title} ===========\ntotal score: {points[title]} \n\n{rows}\n\n"
    assert printed == golden["mme_total"]["printed"]


def test_pope(golden: dict[str, Any]) -> None:
    rows = golden["pope"]
    parsed = [pope.parse_yes_no(text) for text in rows["raw"]]
    assert parsed == rows["parsed"]
    scores = pope.yes_no_scores(parsed, rows["labels"])
    names = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")
    assert [scores[name] for name in names] == list(rows["metrics"].values())
    assert list(rows["metrics"]) == ["accuracy", "precision", "recall", "f1", "yes_ratio"]
