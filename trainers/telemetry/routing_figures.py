"""Figures about expert load, from counts: shares, entropy, dead experts, co-activation. On the CPU, after the fact.

"Even" is what an expert would get if the tokens of every modality spread over all experts of their routing group; 1 times
that is balanced, whatever the number of experts, their groups and the choices per token.

Shape suffixes as in `routing_statistics.py`: L sparse layers, M modalities, E experts, X = E + 1 (null choices last).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...modeling_unimoe.configuration_unimoe_text import MODALITIES, UniMoeTextConfig

# An expert is dead when it gets less than this share of an even load; of fewer even choices than MIN_EVEN none can tell.
DEAD_BELOW = 0.01
MIN_EVEN = 20.0
# Fewer choices than this many per expert have a low entropy by chance.
MIN_CHOICES_PER_EXPERT = 10


@dataclass(frozen=True)
class ExpertLoad:
    """The load of all sparse layers.

    Args:
        layers: their numbers in the decoder.
        tokens_M: tokens of each modality, float64.
        chosen_LMX: how often they chose each expert, float64.
        allowed_ME: which experts the modality's group holds.
    """

    layers: list[int]
    tokens_M: torch.Tensor
    chosen_LMX: torch.Tensor
    allowed_ME: torch.Tensor

    @classmethod
    def of(cls, config: UniMoeTextConfig, tokens_M: Any, chosen_LMX: Any) -> "ExpertLoad":
        """From counts as `RoutingCounts` has them, tensors or nested lists."""
        return cls(
            sorted(config.sparse_layers),
            torch.as_tensor(tokens_M).double(),
            torch.as_tensor(chosen_LMX).double().view(len(config.sparse_layers), len(MODALITIES), -1),
            allowed_experts(config),
        )

    @property
    def modalities(self) -> list[int]:
        """Ids of the modalities that have tokens."""
        return self.tokens_M.nonzero().flatten().tolist()

    @property
    def shares(self) -> torch.Tensor:
        """Share of a modality's choices that went to each expert; null choices do not count, rows sum to 1 or are 0."""
        return _shares(self.chosen_LMX[..., :-1])

    @property
    def layer_shares(self) -> torch.Tensor:
        """The same over all modalities."""
        return _shares(self.chosen_LMX[..., :-1].sum(dim=1))

    @property
    def even(self) -> torch.Tensor:
        """What each expert would get of an even load."""
        choices_LM = self.chosen_LMX[..., :-1].sum(dim=-1)
        spread_ME = self.allowed_ME.double() / self.allowed_ME.sum(dim=-1, keepdim=True).clamp(min=1)
        return choices_LM @ spread_ME

    @property
    def ratios(self) -> torch.Tensor:
        """Load over even load; 0 where nothing could have been expected."""
        return self.chosen_LMX[..., :-1].sum(dim=1) / self.even.clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def max_ratios(self) -> list[float | None]:
        """The largest load of each layer, as a multiple of an even one; None without choices."""
        known = self.even.sum(dim=-1) > 0
        return [float(ratio_E.max()) if ok else None for ratio_E, ok in zip(self.ratios, known, strict=True)]

    @property
    def dead(self) -> list[list[int]]:
        """Experts of each layer that get (next to) nothing, of those about which there is enough to tell."""
        dead_LE = (self.ratios < DEAD_BELOW) & (self.even >= MIN_EVEN)
        return [row.nonzero().flatten().tolist() for row in dead_LE]

    @property
    def entropies(self) -> list[list[float | None]]:
        """Entropy of a modality's load over that of an even one: 1 balanced, 0 one expert; None where choices are few."""
        sizes = self.allowed_ME.sum(dim=-1)
        return [
            [_entropy(chosen_E, float(size)) for chosen_E, size in zip(chosen_ME, sizes, strict=True)]
            for chosen_ME in self.chosen_LMX[..., :-1]
        ]

    @property
    def layer_entropies(self) -> list[float | None]:
        """The same of all tokens that share a routing group, the mean over groups by their choices."""
        groups: dict[tuple[bool, ...], list[int]] = {}
        for modality, allowed_E in enumerate(self.allowed_ME.tolist()):
            groups.setdefault(tuple(allowed_E), []).append(modality)
        values = []
        for chosen_ME in self.chosen_LMX[..., :-1]:
            pairs = [(chosen_ME[members].sum(dim=0), sum(group)) for group, members in groups.items()]
            weighted = [(_entropy(chosen_E, size), float(chosen_E.sum())) for chosen_E, size in pairs]
            known = [(value, weight) for value, weight in weighted if value is not None]
            total = sum(weight for _, weight in known)
            values.append(sum(value * weight for value, weight in known) / total if total else None)
        return values

    @property
    def experts_per_token(self) -> torch.Tensor:
        """Mean number of routed experts that a token chose."""
        return self.chosen_LMX[..., :-1].sum(dim=-1) / self.tokens_M.clamp(min=1)

    @property
    def null_shares(self) -> torch.Tensor:
        """Share of the choices that went to null experts."""
        return self.chosen_LMX[..., -1] / self.chosen_LMX.sum(dim=-1).clamp(min=1)


def allowed_experts(config: UniMoeTextConfig) -> torch.Tensor:
    """Which experts the tokens of each modality may choose from, bool [M, E]."""
    allowed_ME = torch.zeros(len(MODALITIES), config.num_experts, dtype=torch.bool)
    if config.num_experts:
        for modality, group in enumerate(config.group_of_modality):
            allowed_ME[modality, list(config.router_groups[group].experts)] = True
    return allowed_ME


def co_activation(together_LXX: torch.Tensor) -> torch.Tensor:
    """Of the tokens that chose the row's expert, the share that chose the column's too; float64 [L, E, E]."""
    together_LEE = together_LXX[:, :-1, :-1].double()
    return together_LEE / together_LEE.diagonal(dim1=1, dim2=2).clamp(min=1)[..., None]


def load_change(before: ExpertLoad, after: ExpertLoad) -> list[list[float | None]]:
    """Share of a modality's choices that went elsewhere, [layers][modalities]: half the sum of |differences|, 0 to 1."""
    gap_LM = (before.shares - after.shares).abs().sum(dim=-1) / 2
    known_LM = (before.chosen_LMX[..., :-1].sum(-1) > 0) & (after.chosen_LMX[..., :-1].sum(-1) > 0)
    rows = zip(gap_LM.tolist(), known_LM.tolist(), strict=True)
    return [[gap if known else None for gap, known in zip(*row, strict=True)] for row in rows]


def mean_of_known(values: list[float | None]) -> float | None:
    """None when nothing is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shares(chosen: torch.Tensor) -> torch.Tensor:
    return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)


def _entropy(chosen_E: torch.Tensor, size: float) -> float | None:
    total = float(chosen_E.sum())
    if size < 2 or total < MIN_CHOICES_PER_EXPERT * size:
        return None
    share_E = chosen_E[chosen_E > 0] / total
    return max(0.0, float(-(share_E * share_E.log()).sum()) / math.log(size))
