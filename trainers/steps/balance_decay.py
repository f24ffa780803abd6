"""A load-balancing weight that falls while a stage trains, as UniMoE-Audio's does (0.025 to 0.001 in 10,000 steps)."""

from typing import Any

from transformers import TrainerCallback

from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig


class BalanceDecay(TrainerCallback):
    """Moves `router_aux_loss_coef` linearly to its final value, which then stays; the step counts, so resuming is exact.

    Args:
        config: of the model that trains; its coefficient is the first value.
        final: the last value.
        steps: optimizer steps until it is reached.
    """

    def __init__(self, config: UniMoeTextConfig, final: float, steps: int) -> None:
        self.config, self.first, self.final, self.steps = config, config.router_aux_loss_coef, final, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not at the next step's begin: a run that goes on from its last checkpoint has none.
        self._set(state.global_step)

    def _set(self, step: int) -> None:
        done = min(step / self.steps, 1.0)
        self.config.router_aux_loss_coef = self.first + done * (self.final - self.first)
