"""How many parameters a model has, by role: in all, and active for one token."""

from dataclasses import dataclass

import torch

from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..trainers.roles import ROLES, role_of


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one role. `active` is what one token goes through: of E experts only k."""

    total: int
    active: int


def count_parameters(config: UniMoeConfig) -> dict[str, ParameterCount]:
    """Parameters of every role that a model of this configuration has; nothing is allocated.

    A head that is tied to the embeddings counts once, there. The embedding table is active as a whole.
    """
    with torch.device("meta"):
        model = UniMoeForCausalLM(UniMoeConfig(**_fields(config)))
    model.tie_weights()
    text = config.text_config
    share = text.num_experts_per_tok / text.num_experts if text.num_experts else 1.0
    totals: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        totals[role_of(name)] = totals.get(role_of(name), 0) + parameter.numel()
    return {
        role: ParameterCount(totals[role], round(totals[role] * (share if role == "experts" else 1)))
        for role in ROLES
        if role in totals
    }


def total_and_active(counts: dict[str, ParameterCount]) -> ParameterCount:
    """The sum over the roles."""
    return ParameterCount(sum(c.total for c in counts.values()), sum(c.active for c in counts.values()))


def _fields(config: UniMoeConfig) -> dict:
    """A copy's fields: building a model writes into its configuration."""
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}
