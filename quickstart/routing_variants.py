"""The five models of the routing comparison, all upcycled from one dense model and equally wide for every token.

The rule: in a sparse layer a token goes through `per_token` experts, each `granularity` times narrower than the dense FFN,
and both are the same number. So every model has the dense one's active parameters but for the rows of its routers. Pairs
of half FFNs start as copies of the whole one (virtual groups, arXiv 2410.07524): all five start as the same function.
"""

from dataclasses import dataclass

from ..conversion.checkpoints.parameters import ParameterCount, count_parameters
from ..conversion.upcycling.group_presets import group_preset
from ..conversion.upcycling.sparsity import Sparsity
from ..conversion.upcycling.upcycle import upcycle_model
from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from .stages import sparse_layers

BALANCE = 0.001  # weight of the load-balancing loss; MoIIE weighs it twice as much
_DECODER = ("router", "experts", "ffn", "attention", "norms", "embeddings", "head")


@dataclass(frozen=True)
class RoutingVariant:
    """One model.

    Args:
        preset: of `group_preset`; None for the dense model.
        num_experts: in each sparse layer; `per_token` of them are active.
        granularity: into how many experts the dense FFN is split.
    """

    name: str
    preset: str | None = None
    num_experts: int = 0
    per_token: int = 1
    granularity: int = 1

    @property
    def trained_roles(self) -> list[str]:
        """The whole decoder but for its norms and embeddings, and the connectors."""
        own = [] if self.preset is None else ["experts", "router"]
        return ["ffn", "attention", "connectors", *own]


# The paper's four (arXiv 2508.09779), with as many experts as make the same number of FFNs as there, and ours.
VARIANTS = (
    RoutingVariant("Dense"),
    RoutingVariant("Vanilla MoE", "uni-moe", num_experts=8, per_token=2, granularity=2),
    RoutingVariant("Modality MoE", "modality", num_experts=2),
    RoutingVariant("MoIIE", "moiie", num_experts=8, per_token=2, granularity=2),
    RoutingVariant("MoIIE, five groups", "five", num_experts=20, per_token=2, granularity=2),
)


def make_variant(variant: RoutingVariant, dense: UniMoeForCausalLM, seed: int) -> UniMoeForCausalLM:
    """The model that a variant starts as; of the dense one nothing is changed, and only the dense variant is it."""
    if variant.preset is None:
        return dense
    expert_groups, modality_groups = group_preset(variant.preset, variant.num_experts)
    return upcycle_model(
        dense,
        Sparsity(
            num_experts=variant.num_experts,
            num_experts_per_tok=variant.per_token,
            sparse_layers=sparse_layers(dense.config.text_config.num_hidden_layers),
            expert_groups=expert_groups,
            modality_groups=modality_groups,
            granularity=variant.granularity,
            routing={"router_aux_loss_coef": BALANCE},
            seed=seed,
        ),
    )


def decoder_parameters(config: UniMoeConfig) -> ParameterCount:
    """Parameters of the decoder, in all and active for one token."""
    counts = [count for role, count in count_parameters(config).items() if role in _DECODER]
    return ParameterCount(sum(count.total for count in counts), sum(count.active for count in counts))
