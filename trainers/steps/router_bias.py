"""Loss-free balancing in training: the routers' biases move after every optimizer step.

The routers count in training what their tokens choose (`UniMoeRouter.load_C`), over all micro-batches of a step. The
callback adds the counts of all ranks, so that every rank moves its biases alike. Biases are part of the model's state:
checkpoints hold them, and a resumed run goes on with them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

BIAS_NAME = "choice_bias_C"


class RouterBiasUpdate(TrainerCallback):
    """Moves the biases of a `UniMoeTrainer`'s model; does nothing where the model has none."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_loads(self.trainer.base)  # of steps that were only timed

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        if not self.trainer.finite_guard.step_made or accelerator.optimizer_step_was_skipped:
            forget_loads(self.trainer.base)
            return
        several = accelerator.num_processes > 1
        update_choice_biases(self.trainer.base, (lambda load: accelerator.reduce(load, "sum")) if several else None)


def update_choice_biases(model: nn.Module, over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
    """Move the biases of all routers that train, and start counting anew; to be called after an optimizer step.

    Args:
        over_ranks: adds a tensor [routers, rows] up over all ranks; None where there is one.
    """
    routers = _biased_routers(model)
    if not routers:
        return
    counts = [torch.zeros_like(r.choice_bias_C) if r.load_C is None else r.load_C for r in routers]
    loads = torch.stack([count.float() for count in counts])
    loads = loads if over_ranks is None else over_ranks(loads)
    for router, load_C in zip(routers, loads, strict=True):
        if router.weight.requires_grad:
            router.update_choice_bias(load_C.to(router.choice_bias_C.device))
        router.load_C = None


def forget_loads(model: nn.Module) -> None:
    """Drop what the routers counted in a step that was not made: no bias moves for it."""
    for router in _biased_routers(model):
        router.load_C = None


def choice_biases(model: nn.Module) -> dict[str, torch.Tensor]:
    """The biases by their names in the model's state."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(f".{BIAS_NAME}")}


def _biased_routers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "bias_update_rate", 0)]
