"""Average normalised Levenshtein similarity with the threshold one half: DocVQA, InfographicVQA."""

from collections.abc import Sequence
from typing import Any

from unimoe.evaluation.metrics import anls
from unimoe.evaluation.metrics.scores import mean
from unimoe.evaluation.modules import plain_metric


class Anls(plain_metric.PlainMetric):
    """Average normalised Levenshtein similarity with the threshold one half: DocVQA, InfographicVQA."""

    several_references = True

    @staticmethod
    def compute_plain(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return {
            "anls": mean(anls.anls_of(text, answers) for text, answers in zip(predictions, references, strict=True))
        }
