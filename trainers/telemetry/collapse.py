"""An alarm for routers that send all tokens to the same experts, whatever the tokens are.

Every `WINDOW` optimizer steps the decided choices (see `routing_statistics.DECIDED_BY`) of each layer and modality are
looked at. A layer has collapsed when in `WINDOWS` windows in a row, at most 10 steps together, the tokens of a routing group
went to one and the same expert, or to no more experts than each of them chooses.

No alarm is given for what looks like it and is not:

* routers that are zero or nearly so, as after upcycling: ties, and what is close to one, are not decided;
* experts that belong to one modality: another modality of the group that goes elsewhere says that the router can tell;
* few tokens: they prove nothing, though a few that go elsewhere do;
* routers that take most experts for every token, as top-p routing does while it is unsure.

Shape suffixes as in `routing_statistics.py`.
"""

import math
from typing import NamedTuple

import torch

from ...modeling_unimoe.configuration_unimoe_text import MODALITIES, UniMoeTextConfig
from .routing_figures import allowed_experts
from .routing_statistics import RoutingCounts

WINDOW = 3
WINDOWS = 2
SHARE = 0.95
MIN_TOKENS = 64
# So many tokens that go elsewhere show that a router has not collapsed.
MIN_CONTRARY = 8


class Collapse(NamedTuple):
    """One layer's collapse. `shares`: modality -> share of its tokens that the experts took; "null" may be among them."""

    layer: int
    experts: tuple[str, ...]
    shares: dict[str, float]

    def __str__(self) -> str:
        many = len(self.experts) > 1
        takes = f"expert{'s' if many else ''} {' and '.join(self.experts)} take{'' if many else 's'}"
        shares = ", ".join(f"{100 * share:.0f} % of the {name} tokens" for name, share in self.shares.items())
        return f"layer {self.layer}: {takes} {shares}"


class CollapseWatch:
    """Follows the windows of a run."""

    # What `look` needs of the counts.
    NEEDS = ("tokens_NM", "chosen_NLMX", "first_LMX", "decided_LMX")

    def __init__(self, config: UniMoeTextConfig) -> None:
        self.layers = sorted(config.sparse_layers)
        self.num_experts = config.num_experts
        self.dynamic = config.router_type == "dynamic"
        allowed_ME = allowed_experts(config)
        self.choosable_M = (allowed_ME.sum(dim=1) + (config.num_null_experts > 0)).tolist()
        self.groups: dict[int, list[int]] = {}
        for modality, group in enumerate(config.group_of_modality if config.num_experts else ()):
            self.groups.setdefault(group, []).append(modality)
        self._streaks: dict[tuple[int, int], tuple[tuple[str, ...], int]] = {}

    def look(self, window: RoutingCounts) -> list[Collapse]:
        """The collapses that this window completes; each is told once, until the layer has recovered."""
        tokens_M = window.tokens_NM.sum(dim=0)
        chosen_LMX = window.chosen_NLMX.sum(dim=0)
        found = []
        for index, layer in enumerate(self.layers):
            for group, modalities in self.groups.items():
                verdict = self._verdict(modalities, tokens_M, chosen_LMX[index], window, index)
                if verdict is None:
                    continue
                experts, shares = verdict
                before, streak = self._streaks.get((index, group), ((), 0))
                streak = streak + 1 if experts and experts == before else int(bool(experts))
                self._streaks[index, group] = experts, streak
                if streak == WINDOWS:
                    found.append(Collapse(layer, experts, shares))
        return found

    def _verdict(
        self,
        modalities: list[int],
        tokens_M: torch.Tensor,
        chosen_MX: torch.Tensor,
        window: RoutingCounts,
        index: int,
    ) -> tuple[tuple[str, ...], dict[str, float]] | None:
        """The experts that took everything, and the modalities' shares; no experts when that is not so, None unknown."""
        seen = [m for m in modalities if tokens_M[m] >= MIN_CONTRARY]
        if not any(tokens_M[m] >= MIN_TOKENS for m in seen):
            return None
        best = max(seen, key=lambda m: int(tokens_M[m]))
        per_token = float(chosen_MX[best].sum() / tokens_M[best])
        first_MX, decided_MX = window.first_LMX[index], window.decided_LMX[index]
        several = max(1, math.ceil(per_token - 0.05))
        for taken_MX, count in ((first_MX, 1), (decided_MX, several)):
            unsure = taken_MX is first_MX and self.dynamic  # a token that also takes others has not made up its mind
            if unsure or 2 * count > self.choosable_M[best]:
                continue
            columns = taken_MX[best].topk(count).indices.tolist()
            whole_M = tokens_M * (1 if count == 1 else per_token)
            shares = {m: float(taken_MX[m, columns].sum() / whole_M[m]) for m in seen}
            if min(shares.values()) >= SHARE:
                experts = tuple(self._name(column) for column in sorted(columns))
                return experts, {MODALITIES[m]: min(1.0, share) for m, share in shares.items()}
        return (), {}

    def _name(self, column: int) -> str:
        return "null" if column == self.num_experts else str(column)


def alarm_text(collapses: list[Collapse], step: int, most: int = 4) -> str:
    """The warning."""
    listed = "; ".join(map(str, collapses[:most]))
    more = f"; and {len(collapses) - most} more layers" if len(collapses) > most else ""
    return (
        f"Expert load has collapsed at step {step}: {listed}{more}. The other experts learn nothing any more. Lower the "
        "router's learning rate, raise router_aux_loss_coef or set router_bias_update_rate, or train with more "
        "modalities; telemetry.on_collapse says whether this stops a run."
    )
