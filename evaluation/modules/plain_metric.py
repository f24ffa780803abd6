"""What the modules of `evaluate` share: texts in, one number out."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

# Computes the metric: predictions and references, one for each of them.
Compute = Callable[[Sequence[str], Sequence[Any]], dict[str, float]]


class PlainMetric(evaluate.Metric):
    """A metric of `unimoe.evaluation.metrics` behind the interface of `evaluate`.

    Subclasses set `compute_plain` and `several_references` (a list of texts per item, in place of one text).
    """

    compute_plain: Compute
    several_references = False

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        reference = datasets.Sequence(text) if self.several_references else text
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").strip(),
            citation="",
            inputs_description="predictions: texts; references: a text, or a list of texts, for each of them.",
            features=datasets.Features({"predictions": text, "references": reference}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        return type(self).compute_plain(predictions, references)


def rows_of(predictions: Sequence[str]) -> list[dict[str, Any]]:
    """The form that the plain functions take."""
    return [{"question_id": number, "prediction": text} for number, text in enumerate(predictions)]


def by_number(values: Sequence[Any]) -> dict[int, Any]:
    """Values by their place."""
    return dict(enumerate(values))
