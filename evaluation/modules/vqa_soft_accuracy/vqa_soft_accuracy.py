"""Soft accuracy in percent against the answers of ten people: TextVQA, A-OKVQA, OK-VQA."""

from collections.abc import Sequence
from typing import Any

from unimoe.evaluation.metrics import soft_accuracy
from unimoe.evaluation.modules import plain_metric
from unimoe.evaluation.modules.plain_metric import by_number, rows_of


class VqaSoftAccuracy(plain_metric.PlainMetric):
    """Soft accuracy in percent against the answers of ten people: TextVQA, A-OKVQA, OK-VQA."""

    several_references = True

    @staticmethod
    def compute_plain(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return {"vqa_soft_accuracy": soft_accuracy.soft_accuracy(rows_of(predictions), by_number(references)).score}
