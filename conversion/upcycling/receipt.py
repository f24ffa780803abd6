"""The receipt of a conversion: what went in, what came out, and by how much the two models differ."""

from dataclasses import dataclass, field
from typing import Any

from ...errors import ConversionError
from ..publishing.saved_receipt import SavedReceipt

# On logits up to 1; larger ones lose as many absolute digits as they are larger, in any order of summation.
MAX_RELATIVE_DIFFERENCE = 1e-5
_SHOWN_KEYS = 4


@dataclass
class Continuation:
    """Greedy continuations of one prompt by both models; `text` is that of the converted one."""

    prompt: str
    tokens: int
    equal: bool
    text: str


@dataclass
class Comparison:
    """Two models on the same prompts, both in `arithmetic` (float32), whatever the weights are stored in.

    Args:
        max_abs_logit_difference, max_abs_logit: over all prompts, positions and tokens, routed as the router says.
        each_expert_difference: the same on one prompt, with every expert in turn and equal weights in place of the
            router. No order of summation changes then, so that it is free of the mixture's rounding.
        rounding_difference: where the weights were stored in a smaller dtype, by how much that alone moved the
            source's logits.
        expected_difference: for ways that change the function, how far the source's logits move when its FFNs are
            disturbed as much as is expected of the new ones; an estimate.
        reference: what the converted model is compared with: the source itself, or, where transformers has no class
            for it, its weights in our dense decoder.
    """

    prompts: int
    positions: int
    max_abs_logit_difference: float
    max_abs_logit: float
    each_expert_difference: float
    continuations: list[Continuation]
    arithmetic: str = "float32"
    rounding_difference: float | None = None
    reference: str = "the source"
    expected_difference: float | None = None

    @property
    def bound(self) -> float:
        return MAX_RELATIVE_DIFFERENCE * max(1.0, self.max_abs_logit)


@dataclass(kw_only=True)
class Receipt(SavedReceipt):
    """What a conversion did.

    Args:
        comparison: a text where the models were not run: the reason.
        recipe: how experts and routers were made, a line each.
        exact: whether the model is meant to start as the source's very function.
        allowed_gap: by how much the user lets logits differ; None lets rounding alone.
    """

    source: str
    keys_consumed: int
    keys_produced: int
    keys_dropped: dict[str, str]
    parameters_before: int
    parameters_after: int
    comparison: Comparison | str
    recipe: list[str] = field(default_factory=list)
    exact: bool = True
    allowed_gap: float | None = None

    @property
    def bound(self) -> float | None:
        """What the logits may differ by; None where they were not compared."""
        if isinstance(self.comparison, str):
            return None
        return self.comparison.bound if self.allowed_gap is None else max(self.comparison.bound, self.allowed_gap)

    def require_agreement(self) -> None:
        """Raises ConversionError when the models differ by more than they may, or when nobody knows by how much."""
        if isinstance(self.comparison, str):
            if not self.exact and self.allowed_gap is None:
                raise ConversionError(
                    f"This way changes the function, and by how much was not measured: {self.comparison}. Nothing was "
                    "written. Allow it with --allow-gap inf."
                )
            return
        gaps = [self.comparison.max_abs_logit_difference]
        if self.exact:
            gaps.append(self.comparison.each_expert_difference)
        for gap in gaps:
            # Written so that a NaN fails.
            if gap <= self.bound:
                continue
            raise ConversionError(self._disagreement(gap, self.comparison))
        for continuation in self.comparison.continuations:
            if not continuation.equal and self.allowed_gap is None:
                raise ConversionError(
                    f"The converted model continues {continuation.prompt!r} differently: {continuation.text!r}. "
                    "Nothing was written."
                )

    def _disagreement(self, gap: float, comparison: Comparison) -> str:
        start = f"The converted model's logits differ from the source's by up to {gap:.3g}"
        if self.exact:
            return (
                f"{start}; at most {self.bound:.3g} is rounding. Nothing was written. The source computes something "
                "that our decoder does not: report it."
            )
        return (
            f"{start}; about {comparison.expected_difference or 0:.2g} is expected of this way, which changes the "
            f"function, and {self.bound:.3g} is allowed. Nothing was written. Allow it with --allow-gap {gap * 1.1:.2g}."
        )

    def lines(self) -> list[str]:
        """The receipt for a reader."""
        lines = [
            *(f"{'recipe':<12}{line}" for line in self.recipe),
            f"tensors     {self.keys_consumed} consumed, {self.keys_produced} produced; dropped: {self._dropped()}",
            f"parameters  {self.parameters_before:,} -> {self.parameters_after:,} "
            f"({self.parameters_active:,} active per token)",
            f"written     {self.written()}",
        ]
        if isinstance(self.comparison, str):
            return [*lines, f"not run     {self.comparison}"]
        return lines + self._comparison_lines(self.comparison)

    def _dropped(self) -> str:
        """What was not taken over, by reason; many tensors of one reason are counted."""
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.keys_dropped.items():
            by_reason.setdefault(reason, []).append(key)
        listed = (
            f"{', '.join(keys)} ({reason})" if len(keys) <= _SHOWN_KEYS else f"{len(keys)} tensors ({reason})"
            for reason, keys in by_reason.items()
        )
        return ", ".join(listed) or "none"

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        if isinstance(self.comparison, Comparison):
            content["comparison"]["bound"] = self.bound
        return content

    def _comparison_lines(self, comparison: Comparison) -> list[str]:
        each = f"{comparison.each_expert_difference:.2g} against {comparison.reference} with every expert in turn, "
        routed = f"{comparison.max_abs_logit_difference:.2g}"
        lines = [
            f"max |Δlogit| {each}{routed} as routed"
            if self.exact
            else f"max |Δlogit| {routed} against {comparison.reference}; about {comparison.expected_difference or 0:.2g} "
            "is expected of this way, which changes the function",
            f"            ({comparison.arithmetic}, {comparison.positions} positions of {comparison.prompts} prompts, "
            f"logits up to {comparison.max_abs_logit:.3g}; refused above {self.bound:.2g})",
        ]
        if comparison.rounding_difference is not None:
            lines.append(
                f"rounding    to {self.dtype} by itself moves logits by up to {comparison.rounding_difference:.3g}"
            )
        for one in comparison.continuations:
            verdict = "the same" if one.equal else "DIFFERENT"
            lines.append(f"greedy      {verdict} {one.tokens} tokens: {one.prompt!r} -> {one.text!r}")
        return lines
