"""What a dense decoder is to become, as data, and the configuration that follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError

from ...errors import ConfigurationError, ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig

RouterInit = Literal["normal", "zeros", "prompts", "cluster"]
Split = Literal["virtual-groups", "slices"]
# Rows of fewer values than this cannot be multiplied by the grouped kernels, in any dtype.
_EXPERT_WIDTH_MULTIPLE = 8
# Fields of `UniMoeTextConfig` that say how tokens are routed and have no argument of their own in `Sparsity`.
ROUTING_FIELDS = frozenset(name for name in UniMoeTextConfig.__annotations__ if name.startswith("router_")) | {
    "num_null_experts",
    "num_shared_experts",
    "norm_topk_prob",
    "expert_capacity_factor",
    "min_expert_capacity",
    "capacity_policy",
    "modality_experts",
}


@dataclass(frozen=True)
class Sparsity:
    """What the dense decoder becomes; field names are those of `UniMoeTextConfig`.

    Args:
        num_experts: routed experts per sparse layer, fine ones counted one by one.
        sparse_layers: in any order; kept as a sorted tuple.
        router_init: "normal" draws gate rows with the configuration's `initializer_range`. "zeros" sends all tokens to
            the same k experts with equal weights: with copied FFNs not even rounding changes, but nothing spreads
            the tokens until training moves the router. "prompts" and "cluster" look at hidden states, see `router_init`.
        routing: further `UniMoeTextConfig` fields, e.g. {"router_aux_loss_coef": 0.01, "num_shared_experts": 1}.
        seed: of the gate rows and of what is drawn for experts; layers and experts draw from generators of their own.
        granularity: in how many parts the dense FFN is split; every expert is one part, and its width that much smaller.
        split: what the parts of a granularity above 1 are, see `expert_init`.
        noise: standard deviation of the Gaussian noise on the routed experts' weights, in units of each weight matrix's
            own standard deviation.
        drop_ratio: share of each routed expert's width that starts anew (Drop-Upcycling, arXiv 2502.19261).
    """

    num_experts: int
    num_experts_per_tok: int
    sparse_layers: Sequence[int]
    expert_groups: dict[str, list[int]] | None = None
    modality_groups: dict[str, str] | None = None
    router_init: RouterInit = "normal"
    routing: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    granularity: int = 1
    split: Split = "virtual-groups"
    noise: float = 0.0
    drop_ratio: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparse_layers", tuple(sorted(self.sparse_layers)))

    @property
    def num_null_experts(self) -> int:
        return int(self.routing.get("num_null_experts", 0))

    @property
    def parts_per_copy(self) -> int:
        """Experts that share a gate row, because together they are a copy of the dense FFN; slices choose for themselves."""
        return self.granularity if self.split == "virtual-groups" else 1

    @property
    def num_copies(self) -> int:
        """How many such copies there are, which routers tell apart."""
        return self.num_experts // self.parts_per_copy


def sparse_config(dense: UniMoeConfig, sparsity: Sparsity) -> UniMoeConfig:
    """The configuration of the sparse model; only the decoder's part differs."""
    fields = dense.to_dict()
    fields["text_config"] = sparse_text_config(dense.text_config, sparsity).to_dict()
    return UniMoeConfig(**{name: value for name, value in fields.items() if name != "model_type"})


def sparse_text_config(dense: UniMoeTextConfig, sparsity: Sparsity) -> UniMoeTextConfig:
    """The decoder's configuration, with `sparsity` in it.

    Raises:
        ConversionError: the source is sparse already, or `sparsity` contradicts itself.
        ConfigurationError: the routing is impossible, or one of its values is.
    """
    if dense.sparse_layers:
        raise ConversionError(
            f"The source already has {dense.num_experts} experts in layers {dense.sparse_layers}; "
            "only a dense model can be made sparse. Give the dense model it was made from."
        )
    if not sparsity.sparse_layers:
        raise ConversionError("The list of layers to make sparse is empty: name at least one.")
    _check_ranges(sparsity)
    width = _expert_width(dense.intermediate_size, sparsity)
    shared_width = width if sparsity.split == "slices" else dense.intermediate_size
    fields = dense.to_dict() | {
        "num_experts": sparsity.num_experts,
        "num_experts_per_tok": sparsity.num_experts_per_tok,
        "moe_intermediate_size": width,
        "shared_intermediate_size": shared_width,
        "sparse_layers": list(sparsity.sparse_layers),
        "expert_groups": sparsity.expert_groups,
        "modality_groups": sparsity.modality_groups,
    }
    if sparsity.granularity > 1 and sparsity.split == "virtual-groups":
        # Rounded to bfloat16 the logits of different copies are often equal, and a token would mix parts of both.
        fields["router_in_float32"] = True
    fields |= sparsity.routing
    fields.pop("model_type", None)
    try:
        config = UniMoeTextConfig(**fields)
    except StrictDataclassError as error:
        raise ConfigurationError(" ".join(str(error.__cause__ or error).split())) from error
    if sparsity.parts_per_copy > 1:
        _check_virtual_groups(config, sparsity)
    return config


def _check_ranges(sparsity: Sparsity) -> None:
    if sparsity.num_experts < 1:
        raise ConversionError(f"num_experts is {sparsity.num_experts}; a sparse layer needs one at least.")
    if not 0 <= sparsity.drop_ratio <= 1:
        raise ConversionError(f"drop_ratio is {sparsity.drop_ratio}; it is a share of each expert, from 0 to 1.")
    if not 0 <= sparsity.noise < float("inf"):
        raise ConversionError(f"noise is {sparsity.noise}; it must be 0 or a positive number.")
    if sparsity.split not in ("virtual-groups", "slices"):
        raise ConversionError(f"split is {sparsity.split!r}; it must be 'virtual-groups' or 'slices'.")


def _expert_width(dense_width: int, sparsity: Sparsity) -> int:
    parts = sparsity.granularity
    if parts < 1 or dense_width % parts:
        raise ConversionError(
            f"granularity is {parts}; it must divide the width of the dense FFN, which is {dense_width}."
        )
    width = dense_width // parts
    if parts > 1 and width % _EXPERT_WIDTH_MULTIPLE:
        raise ConversionError(
            f"granularity {parts} makes experts of width {width}, which must be a multiple of {_EXPERT_WIDTH_MULTIPLE}."
        )
    return width


def _check_virtual_groups(config: UniMoeTextConfig, sparsity: Sparsity) -> None:
    """Every token must be able to choose whole copies of the dense FFN, that is all parts of each."""
    parts, per_token = sparsity.granularity, sparsity.num_experts_per_tok
    for name, count in (("num_experts", sparsity.num_experts), ("num_experts_per_tok", per_token)):
        if count % parts:
            raise ConversionError(
                f"{name} is {count}, but a granularity of {parts} needs a multiple of it: {parts} experts together are "
                "one copy of the dense FFN (arXiv 2410.07524), and a token uses whole copies at first."
            )
    if sparsity.router_init == "zeros":
        raise ConversionError(
            f"A granularity of {parts} does not go with router_init 'zeros': among equal logits any {per_token} experts "
            "may be chosen, and not just whole copies of the dense FFN. Use 'normal'."
        )
    for name, value in (("router_type", "dynamic"), ("router_pick", "sample_always")):
        if getattr(config, name) == value:
            raise ConversionError(
                f"A granularity of {parts} does not go with {name} {value!r}, which does not choose whole copies of the "
                "dense FFN with equal weights. Leave one of the two out, or use split 'slices'."
            )
    for group in config.router_groups:
        whole = {expert // parts * parts + part for expert in group.experts for part in range(parts)}
        if whole != set(group.experts):
            raise ConversionError(
                f"The routing group {group.name!r} has experts {list(group.experts)}, but with a granularity of {parts} "
                f"it needs whole copies of the dense FFN, such as experts {list(range(parts))}."
            )


__all__ = ["ROUTING_FIELDS", "RouterInit", "Sparsity", "Split", "sparse_config", "sparse_text_config"]
