"""Share in percent of texts that equal the answer once blanks around them are gone."""

from collections.abc import Sequence
from typing import Any

from unimoe.evaluation.metrics import exact_match
from unimoe.evaluation.modules import plain_metric
from unimoe.evaluation.modules.plain_metric import by_number


class ExactMatchPercent(plain_metric.PlainMetric):
    """Share in percent of texts that equal the answer once blanks around them are gone."""

    @staticmethod
    def compute_plain(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return {"exact_match_percent": exact_match.exact_match(by_number(predictions), by_number(references)).score}
