"""CIDEr-D times 100, with document frequencies of the references given."""

from collections.abc import Sequence
from typing import Any

from unimoe.evaluation.metrics import captioning
from unimoe.evaluation.metrics.scores import mean
from unimoe.evaluation.modules import plain_metric


class Cider(plain_metric.PlainMetric):
    """CIDEr-D times 100, with document frequencies of the references given."""

    several_references = True

    @staticmethod
    def compute_plain(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return {"cider": 100 * mean(captioning.cider(predictions, references))}
