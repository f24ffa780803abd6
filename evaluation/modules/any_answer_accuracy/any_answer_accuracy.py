"""Share of texts that equal one of several answers once both are normalised: ST-VQA."""

from collections.abc import Sequence
from typing import Any

from unimoe.evaluation.metrics import soft_accuracy
from unimoe.evaluation.modules import plain_metric
from unimoe.evaluation.modules.plain_metric import by_number, rows_of


class AnyAnswerAccuracy(plain_metric.PlainMetric):
    """Share of texts that equal one of several answers once both are normalised: ST-VQA."""

    several_references = True

    @staticmethod
    def compute_plain(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return {
            "any_answer_accuracy": soft_accuracy.any_answer_accuracy(rows_of(predictions), by_number(references)).score
        }
