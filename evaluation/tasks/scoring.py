"""From items and texts to the metrics' arguments."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..metrics import ai2d as ai2d_metric
from ..metrics import anls as anls_metric
from ..metrics import captioning as captioning_metric
from ..metrics import chartqa as chartqa_metric
from ..metrics import cmmmu as cmmmu_metric
from ..metrics import exact_match as exact_metric
from ..metrics import gqa as gqa_metric
from ..metrics import hallusionbench as hallusion_metric
from ..metrics import mme as mme_metric
from ..metrics import mmmu as mmmu_metric
from ..metrics import option_letters as letters_metric
from ..metrics import pope as pope_metric
from ..metrics import qbench as qbench_metric
from ..metrics import scienceqa as scienceqa_metric
from ..metrics import seedbench as seed_metric
from ..metrics import soft_accuracy as soft_metric
from ..metrics import speech_recognition as speech_metric
from ..metrics.scores import Scores
from .item import Item
from .task import Texts

Items = Sequence[Item]


def predictions_of(items: Items, texts: Texts) -> list[dict[str, Any]]:
    return [{"question_id": item.id, "prediction": texts[item.id]} for item in items]


def answers_of(items: Items) -> dict[Any, Any]:
    return {item.id: item.answer for item in items}


def soft_accuracy(items: Items, texts: Texts) -> Scores:
    return soft_metric.soft_accuracy(predictions_of(items, texts), answers_of(items))


def exact(items: Items, texts: Texts) -> Scores:
    return exact_metric.exact_match({item.id: texts[item.id] for item in items}, answers_of(items))


def majority(items: Items, texts: Texts) -> Scores:
    return exact_metric.majority_match({item.id: texts[item.id] for item in items}, answers_of(items))


def letters(items: Items, texts: Texts) -> Scores:
    gold = [
        {"question_id": item.id, "options": item.options, "answer": item.answer, "category": item.category}
        for item in items
    ]
    return letters_metric.option_letters(gold, texts)


def scienceqa(items: Items, texts: Texts) -> Scores:
    gold = [
        {
            "question_id": item.id,
            "answer": item.letters.index(item.answer),
            "num_choices": len(item.options),
            "has_image": bool(item.media),
        }
        for item in items
    ]
    return scienceqa_metric.scienceqa(gold, predictions_of(items, texts))


def seedbench(items: Items, texts: Texts) -> Scores:
    questions = [item.record for item in items]
    names = {item.category: item.record["question_type_id"] for item in items}
    return seed_metric.seedbench(questions, names, predictions_of(items, texts))


def qbench(items: Items, texts: Texts) -> Scores:
    gold = [{"question_id": i.id, "candidates": i.options, "correct_ans": i.record["correct_ans"]} for i in items]
    return qbench_metric.qbench(gold, predictions_of(items, texts))


def ai2d(items: Items, texts: Texts) -> Scores:
    gold = [{"question_id": i.id, "gt_answer": str(i.letters.index(i.answer))} for i in items]
    return ai2d_metric.ai2d(gold, predictions_of(items, texts))


def chartqa(items: Items, texts: Texts) -> Scores:
    gold = [{"question_id": item.id, "gt_answer": item.answer, "type": item.category} for item in items]
    return chartqa_metric.chartqa(gold, predictions_of(items, texts))


def hallusionbench(items: Items, texts: Texts) -> Scores:
    gold = [{"question_id": item.id, "gt_answer": item.answer, "category": item.category} for item in items]
    return hallusion_metric.hallusionbench(gold, predictions_of(items, texts))


def anls(items: Items, texts: Texts) -> Scores:
    return anls_metric.anls([item.record for item in items], texts)


def gqa(items: Items, texts: Texts) -> Scores:
    return gqa_metric.gqa({item.id: item.record for item in items}, texts)


def mmmu(items: Items, texts: Texts) -> Scores:
    """Letters are first reduced as the original does; where it would draw one at random, the item is wrong."""
    gold = {item.id: item.record for item in items}
    reduced = {i.id: mmmu_metric.parse_letter(texts[i.id], i.options) if i.options else texts[i.id] for i in items}
    return mmmu_metric.mmmu(gold, reduced)


def cmmmu(items: Items, texts: Texts) -> Scores:
    return cmmmu_metric.cmmmu_responses([item.record for item in items], texts)


def pope(items: Items, texts: Texts) -> Scores:
    labels: dict[str, list[str]] = {}
    predictions: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        labels.setdefault(item.category, []).append(item.answer)
        predictions.setdefault(item.category, []).append({"question_id": item.id, "prediction": texts[item.id]})
    return pope_metric.pope(labels, predictions)


def mme(items: Items, texts: Texts) -> Scores:
    """Rows also say whether both questions of the picture are right (`both`)."""
    gold, predictions = {}, []
    for item in items:
        category, file = mme_metric.picture_of(item.record["question_id"])
        gold[category, file, f"{item.question} {mme_metric.INSTRUCTION}"] = item.answer
        row = {"question_id": item.record["question_id"], "question": item.question, "prediction": texts[item.id]}
        predictions.append(row)
    scores = mme_metric.mme(gold, predictions)
    right: dict[str, list[int]] = {}
    for item, row in zip(items, scores.per_sample, strict=True):
        right.setdefault(item.cluster, []).append(row["score"])
    rows = [
        {**row, "question_id": item.id, "both": int(sum(right[item.cluster]) == 2)}
        for item, row in zip(items, scores.per_sample, strict=True)
    ]
    return replace(scores, per_sample=rows)


def captions(items: Items, texts: Texts) -> Scores:
    return captioning_metric.captioning({item.id: texts[item.id] for item in items}, answers_of(items))


def word_errors(items: Items, texts: Texts) -> Scores:
    return speech_metric.error_rates({item.id: texts[item.id] for item in items}, answers_of(items))
