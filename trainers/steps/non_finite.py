"""Losses and gradients that are not finite: the step is stopped, or left out, before it reaches a weight."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from ...errors import TrainingError

logger = logging.get_logger(__name__)

# With gradients that are not even scaled up any more, an overflow is no fault of the scale.
_LEAST_SCALE = 1.0


class _Batch(NamedTuple):
    raw: dict[str, Any]  # what `compute_loss` was given
    inputs: dict[str, Any]  # what the model was given
    loss: torch.Tensor


class FiniteGuard:
    """Looks at the batches of an optimizer step before it is made.

    Args:
        max_skipped: steps that may be left out; one more ends the run.

    Attributes: skipped, how many were; it goes into checkpoints. step_made, whether the last step was let through.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        self.max_skipped = max_skipped
        self.skipped = 0
        self.step_made = True
        self._batches: list[_Batch] = []

    def add(self, raw: dict[str, Any], inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """Remember a batch until the optimizer's step; nothing is copied."""
        self._batches.append(_Batch(raw, inputs, loss.detach()))

    def forget(self) -> None:
        """Drop the batches of a step that is not made."""
        self._batches = []

    def passes(self, trainer: Any, norm: torch.Tensor | float) -> bool:
        """Whether the step may be made; if not, it has no gradients any more. All ranks decide alike.

        Args:
            norm: of the gradients, over all ranks.

        Raises:
            TrainingError: losses or gradients are not finite and no step may be left out any more.
        """
        batches, self._batches = self._batches, []
        losses = torch.stack([batch.loss for batch in batches]) if batches else torch.zeros(0)
        losses_finite = not _on_any_rank(trainer, not _is_finite(losses))
        self.step_made = losses_finite and math.isfinite(float(norm))
        if self.step_made:
            return True
        if trainer.is_deepspeed_enabled:
            raise TrainingError(
                f"{_what(trainer, batches)}. DeepSpeed has made this step, so the weights in memory are spoilt: look at "
                f"these samples ({_samples(batches)}), lower the learning rate, and go on from the last checkpoint."
            )
        if losses_finite and _scale_can_shrink(trainer):
            # Gradients of half precision that were scaled up too far: the scaler leaves the step out and scales less.
            logger.info(
                f"The gradients of step {trainer.state.global_step + 1} overflow float16: scaled less from now on."
            )
            return False
        message = self._describe(trainer, batches)
        if self.skipped >= self.max_skipped:
            before = f" {self.skipped} steps were left out before." if self.skipped else ""
            raise TrainingError(
                f"{message}{before} Nothing was updated; look at these samples, lower the learning rate, or go on from the "
                "last checkpoint."
            )
        self.skipped += 1
        logger.warning(f"{message} The step is left out, as {self.skipped} of at most {self.max_skipped}.")
        for parameter in trainer.model.parameters():
            parameter.grad = None  # the optimizer leaves such parameters, and their moments, alone
        return False

    def _describe(self, trainer: Any, batches: list[_Batch]) -> str:
        bad = [batch for batch in batches if not _is_finite(batch.loss)]
        named = bad or batches
        # Ranks may have to run the model together, so all of them look at as many batches.
        looked_at = named if trainer.accelerator.num_processes == 1 else batches

        def backward() -> None:
            for batch in looked_at:
                trainer.compute_loss(trainer.base, batch.raw).backward()
            self._batches = []

        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        # As in the step itself: what overflows in half precision may not do so in float32.
        with trainer.accelerator.autocast(), torch.random.fork_rng(devices=devices):
            origin = first_bad_module(
                trainer.base,
                [batch.inputs for batch in looked_at],
                backward,
                lambda found: _on_any_rank(trainer, found),
            )
        return f"{_what(trainer, batches)}; it begins with {origin}. Samples of the batch: {_samples(named)}."


def _what(trainer: Any, batches: list[_Batch]) -> str:
    what = "gradient norm" if all(_is_finite(batch.loss) for batch in batches) else "loss"
    return f"The {what} is not finite at step {trainer.state.global_step + 1} on rank {trainer.args.process_index}"


def _samples(batches: list[_Batch]) -> str:
    return ", ".join(str(name) for batch in batches for name in batch.raw.get("sample_ids", ()))


def _on_any_rank(trainer: Any, found: bool) -> bool:
    if trainer.accelerator.num_processes == 1:
        return found
    ranks = trainer.accelerator.reduce(torch.tensor(float(found), device=trainer.args.device), "sum")
    return float(ranks) > 0


def _scale_can_shrink(trainer: Any) -> bool:
    """Whether gradients are float16 and scaled up."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() > _LEAST_SCALE


def first_bad_module(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    backward: Callable[[], None],
    on_any_rank: Callable[[bool], bool] = bool,
) -> str:
    """Name the origin of a loss or gradient that is not finite, for a message.

    Looks at the weights, then at every module's output in a new forward pass, then at gradients as they are made.

    Args:
        batches: inputs of the model's forward.
        backward: makes the gradients of these batches anew; those of the step itself were scaled by their norm, which
            makes all of them NaN.
        on_any_rank: whether any rank has found something, so that all of them look no further.
    """
    elsewhere = "something on another rank, which names it"
    weights = next((name for name, parameter in model.named_parameters() if not _is_finite(parameter)), None)
    if on_any_rank(weights is not None):
        return elsewhere if weights is None else f"the weights of {weights}"
    outputs = [name for batch in batches if (name := _first_bad_output(model, batch)) is not None]
    if on_any_rank(bool(outputs)):
        return f"the output of {outputs[0]}" if outputs else elsewhere
    gradient = _first_bad_gradient(model, backward)
    return "the loss" if gradient is None else f"the gradient of {gradient}"


def _first_bad_output(model: nn.Module, batch: Mapping[str, Any]) -> str | None:
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(_is_finite(tensor) for tensor in _tensors(output)):
                found.append(name)

        return hook

    # Inner modules end before the ones around them, so the first that reports is the innermost.
    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _first_bad_gradient(model: nn.Module, backward: Callable[[], None]) -> str | None:
    found: list[str] = []

    def look(name: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            if not found and not _is_finite(gradient):
                found.append(name)

        return hook

    hooks = [p.register_hook(look(name)) for name, p in model.named_parameters() if p.requires_grad]
    try:
        backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
