"""Word error rate in percent, in lower case and without punctuation."""

from collections.abc import Sequence
from typing import Any

from unimoe.evaluation.metrics import speech_recognition
from unimoe.evaluation.modules import plain_metric
from unimoe.evaluation.modules.plain_metric import by_number


class WordErrorRate(plain_metric.PlainMetric):
    """Word error rate in percent, in lower case and without punctuation."""

    @staticmethod
    def compute_plain(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return {"word_error_rate": speech_recognition.error_rates(by_number(predictions), by_number(references)).score}
