"""Share in percent of right answers, numbers within 5 %: ChartQA."""

from collections.abc import Sequence
from typing import Any

from unimoe.evaluation.metrics import chartqa
from unimoe.evaluation.metrics.scores import percent
from unimoe.evaluation.modules import plain_metric


class RelaxedAccuracy(plain_metric.PlainMetric):
    """Share in percent of right answers, numbers within 5 %: ChartQA."""

    @staticmethod
    def compute_plain(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return {
            "relaxed_accuracy": percent(
                chartqa.is_relaxed_match(text, answer) for text, answer in zip(predictions, references, strict=True)
            )
        }
