"""How many parameters a model has, by role: in all, and active for one token."""

from dataclasses import dataclass

from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...roles import ROLES, role_of
from .meta_model import meta_model


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one role. `active` is what one token goes through: of the routed experts only its choices.

    The number of choices is the mean over tokens of a router without preferences. With null experts that is a share of
    k; with `router_top_p` it is the most that a token can choose, and trained routers stay below it.
    """

    total: int
    active: int


def count_parameters(config: UniMoeConfig) -> dict[str, ParameterCount]:
    """Parameters of every role that a model of this configuration has; nothing is allocated.

    A head that is tied to the embeddings counts once, there. The embedding table is active as a whole.
    """
    model = meta_model(config)
    text = config.text_config
    share = text.even_experts_per_token / text.num_experts if text.num_experts else 1.0
    totals: dict[str, int] = {}
    active: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        role = role_of(name)
        is_routed = role == "experts" and ".shared_experts." not in name
        totals[role] = totals.get(role, 0) + parameter.numel()
        active[role] = active.get(role, 0) + parameter.numel() * (share if is_routed else 1)
    return {role: ParameterCount(totals[role], round(active[role])) for role in ROLES if role in totals}


def total_and_active(counts: dict[str, ParameterCount]) -> ParameterCount:
    """The sum over the roles."""
    return ParameterCount(sum(c.total for c in counts.values()), sum(c.active for c in counts.values()))
