"""The losses of a run, apart: their means over the optimizer steps since they were last read.

Steps that were left out count nowhere, so that a mean is one over steps that were made.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...modeling_unimoe.configuration_unimoe_text import LOSS_COEFFICIENTS, UniMoeTextConfig
from .objective import LossParts

BALANCED = "_balanced"
ALWAYS_LOGGED = ("loss", "ce_loss", "aux_loss", "z_loss")
_ROUTERS_ADD = ("loss", *LOSS_COEFFICIENTS)  # what would be another value if the experts were balanced
# All names that a log may hold: the losses, and what they would be with balanced experts.
LOGGED_LOSSES = ("loss", "ce_loss", *LOSS_COEFFICIENTS, *(f"{name}{BALANCED}" for name in _ROUTERS_ADD))


class LossMeter:
    """Adds up the parts of the losses of the micro-batches of made steps.

    Attributes: groups, cross entropies of this rank's batches at the last `read`, by group of samples.
    """

    def __init__(self) -> None:
        self.groups: dict[str, list[float]] = {}
        self._sums = torch.zeros(len(LOGGED_LOSSES))
        self._steps = 0
        self._pending: list[tuple[str, torch.Tensor]] = []  # of the step in progress
        self._made: list[tuple[str, torch.Tensor]] = []

    def add(self, parts: LossParts, group: str) -> None:
        """Remember a micro-batch until its step is made or left out."""
        zero = torch.zeros_like(parts.cross_entropy)
        routers = [parts.routers.get(name, zero) for name in LOSS_COEFFICIENTS]
        balanced = [parts.balanced.get(name, zero) for name in LOSS_COEFFICIENTS]
        row = [parts.total.detach(), parts.cross_entropy, *routers, parts.total_balanced, *balanced]
        self._pending.append((group, torch.stack(row)))

    def end_step(self, made: bool) -> None:
        pending, self._pending = self._pending, []
        if made:
            for _, row in pending:
                self._sums = self._sums.to(row.device) + row
            self._steps += 1
            self._made += pending

    def read(
        self,
        config: UniMoeTextConfig,
        batches_per_step: int,
        over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, float]:
        """Means since the last call, per step; nothing where no step was made. Losses that do not count are left out.

        Args:
            batches_per_step: of this rank.
            over_ranks: makes of this rank's sums those of the run.
        """
        steps, self._steps = self._steps, 0
        sums = over_ranks(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        made, self._made, self.groups = self._made, [], {}
        losses = torch.stack([row[1].to(made[0][1].device) for _, row in made]).tolist() if made else []
        for (group, _), loss in zip(made, losses, strict=True):
            self.groups.setdefault(group, []).append(loss * batches_per_step)
        if not steps:
            return {}
        return {name: value / steps for name, value in zip(LOGGED_LOSSES, sums, strict=True) if _counts(name, config)}

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on from here has to know, between two steps."""
        made = [[group, row] for group, row in self._made]
        return {"sums": self._sums, "steps": self._steps, "made": made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._steps, self._pending = state["sums"], state["steps"], []
        self._made = [(group, row) for group, row in state["made"]]


def _counts(name: str, config: UniMoeTextConfig) -> bool:
    plain = name.removesuffix(BALANCED)
    if name != plain and not config.sparse_layers:
        return False
    return plain in ALWAYS_LOGGED or bool(getattr(config, LOSS_COEFFICIENTS[plain]))
