"""F1 of yes as POPE reads yes and no; references are yes or no."""

from collections.abc import Sequence
from typing import Any

from unimoe.evaluation.metrics import pope
from unimoe.evaluation.modules import plain_metric


class YesNoF1(plain_metric.PlainMetric):
    """F1 of yes as POPE reads yes and no; references are yes or no."""

    @staticmethod
    def compute_plain(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return {
            "yes_no_f1": pope.yes_no_scores([pope.parse_yes_no(text) for text in predictions], references)["F1 score"]
        }
