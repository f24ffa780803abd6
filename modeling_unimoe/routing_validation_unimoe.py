"""What the routing fields of a decoder's configuration may be, alone and together; and the names that they use."""

import math
from typing import TYPE_CHECKING, Any

from .errors_unimoe import ConfigurationError
from .validation_unimoe import MAX_EXPERTS, require_range

if TYPE_CHECKING:
    from .configuration_unimoe_text import UniMoeTextConfig

# The position of a name in this tuple is its id in `mm_token_type_ids`.
# "speech" is audio that went through the speech tower, "sound" audio that went through the sound branch.
MODALITIES = ("text", "image", "video", "speech", "sound")
# Losses of the routers, by their names in outputs and logs -> the field that weights each.
LOSS_COEFFICIENTS = {
    "aux_loss": "router_aux_loss_coef",
    "z_loss": "router_z_loss_coef",
    "modality_loss": "router_modality_loss_coef",
    "divergence_loss": "router_divergence_loss_coef",
}

_OWNER = "UniMoeTextConfig"


def require_routing(config: "UniMoeTextConfig") -> None:
    """Raises a ConfigurationError unless the routing fields are possible, alone and together."""
    _require_numbers(config)
    wrong = [i for i in config.sparse_layers if not 0 <= i < config.num_hidden_layers]
    if wrong or len(set(config.sparse_layers)) != len(config.sparse_layers):
        raise ConfigurationError(
            f"{_OWNER}.sparse_layers is {config.sparse_layers}; it must list different layers between 0 and "
            f"{config.num_hidden_layers - 1}."
        )
    if not config.num_experts:
        if config.sparse_layers:
            raise ConfigurationError(f"{_OWNER}.sparse_layers is {config.sparse_layers} but num_experts is 0.")
        return
    for name, experts in (config.expert_groups or {}).items():
        _require_group(config, name, experts)
    _require_modality_groups(config)
    _require_choices(config)
    _require_fitting_router(config)
    _require_group_coefs(config)
    _require_modality_losses(config)


def _require_numbers(config: "UniMoeTextConfig") -> None:
    for field in ("num_experts", "num_null_experts", "num_shared_experts"):
        require_range(_OWNER, field, getattr(config, field), 0, MAX_EXPERTS)
    if not 0 <= config.router_jitter_noise < 1:
        raise ConfigurationError(
            f"{_OWNER}.router_jitter_noise is {config.router_jitter_noise!r}; it must be >= 0 and below 1."
        )
    for field in ("router_near_max_band", "router_bias_update_rate", *LOSS_COEFFICIENTS.values()):
        if not math.isfinite(getattr(config, field)) or getattr(config, field) < 0:
            raise ConfigurationError(f"{_OWNER}.{field} is {getattr(config, field)!r}; it must be finite and >= 0.")


def _require_group(config: "UniMoeTextConfig", name: str, experts: list[int]) -> None:
    if not experts or len(set(experts)) != len(experts) or not set(experts) <= set(range(config.num_experts)):
        raise ConfigurationError(
            f"{_OWNER}.expert_groups[{name!r}] is {experts}; it must list different experts between 0 and "
            f"{config.num_experts - 1}."
        )


def _require_modality_groups(config: "UniMoeTextConfig") -> None:
    names = sorted(config.expert_groups or {"all": []})
    for modality, group in (config.modality_groups or {}).items():
        if modality not in MODALITIES:
            raise ConfigurationError(
                f"{_OWNER}.modality_groups names {modality!r}, which is no modality: use {MODALITIES}."
            )
        if group not in names:
            raise ConfigurationError(
                f"{_OWNER}.modality_groups sends {modality!r} to {group!r}, which is not in expert_groups "
                f"({names}). Give every modality of {MODALITIES} a group that exists."
            )


def _require_choices(config: "UniMoeTextConfig") -> None:
    """Enough experts in every group, and none that no group holds."""
    smallest = min(len(group.experts) for group in config.router_groups) + config.num_null_experts
    if not 1 <= config.num_experts_per_tok <= smallest:
        null = ", null experts included" if config.num_null_experts else ""
        raise ConfigurationError(
            f"{_OWNER}.num_experts_per_tok is {config.num_experts_per_tok}; it must be between 1 and {smallest}, "
            f"the number of experts in the smallest group{null}."
        )
    unused = set(range(config.num_experts)) - {i for group in config.router_groups for i in group.experts}
    if unused:
        raise ConfigurationError(f"{_OWNER}.expert_groups names no group for experts {sorted(unused)}: add them.")


def _require_fitting_router(config: "UniMoeTextConfig") -> None:
    """Fields that one type of router has, or that one way of choosing needs."""
    require_range(_OWNER, "router_top_p", config.router_top_p, 0, 1)
    require_range(_OWNER, "min_expert_capacity", config.min_expert_capacity, 1, 1 << 31)
    factor = config.expert_capacity_factor
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise ConfigurationError(
            f"{_OWNER}.expert_capacity_factor is {factor!r}; it must be finite and > 0, or None to drop no token."
        )
    needed: dict[str, Any] = {"router_top_p": 0, "expert_capacity_factor": None}
    wanted = "'dynamic'"
    if config.router_type == "dynamic":
        needed = {"expert_groups": None, "router_scoring": "softmax", "norm_topk_prob": True}
        needed |= {"router_aux_loss_counts": "all", "router_losses_as_released": False, "router_bias_update_rate": 0}
        wanted = "'top_k'"
    for field, value in needed.items():
        if getattr(config, field) != value:
            raise ConfigurationError(
                f"{_OWNER}.{field} is {getattr(config, field)!r}, which is not combined with router_type "
                f"{config.router_type!r}: set it to {value!r}, or router_type to {wanted}."
            )
    if config.router_bias_update_rate and config.router_pick != "max":
        raise ConfigurationError(
            f"{_OWNER}.router_bias_update_rate is {config.router_bias_update_rate} together with router_pick "
            f"{config.router_pick!r}: biases move the best choices, not draws. Set router_pick to 'max'."
        )


def _require_group_coefs(config: "UniMoeTextConfig") -> None:
    names = [group.name for group in config.router_groups]
    for name, value in (config.router_group_aux_loss_coefs or {}).items():
        if name not in names:
            raise ConfigurationError(
                f"{_OWNER}.router_group_aux_loss_coefs names {name!r}, which is no routing group: use {names}."
            )
        if not math.isfinite(value) or value < 0:
            raise ConfigurationError(
                f"{_OWNER}.router_group_aux_loss_coefs[{name!r}] is {value!r}; it must be finite and >= 0."
            )


def _require_modality_losses(config: "UniMoeTextConfig") -> None:
    for name, experts in (config.modality_experts or {}).items():
        if name not in MODALITIES or not experts or not set(experts) <= set(range(config.num_experts)):
            raise ConfigurationError(
                f"{_OWNER}.modality_experts[{name!r}] is {experts}; it must map one of {MODALITIES} to experts between "
                f"0 and {config.num_experts - 1}."
            )
    if config.router_modality_loss_coef and not config.modality_experts:
        raise ConfigurationError(
            f"{_OWNER}.router_modality_loss_coef is {config.router_modality_loss_coef} but modality_experts is "
            f"{config.modality_experts}: name the experts of at least one modality."
        )
    for field in ("router_modality_loss_coef", "router_divergence_loss_coef", "router_losses_as_released"):
        if getattr(config, field) and config.expert_groups is not None:
            raise ConfigurationError(
                f"{_OWNER}.{field} is {getattr(config, field)!r} together with expert_groups: modalities whose experts "
                "are set apart need no such loss. Set one of the two to its default."
            )
    if config.router_losses_as_released and config.router_aux_loss_layers != "each":
        raise ConfigurationError(
            f"{_OWNER}.router_aux_loss_layers is {config.router_aux_loss_layers!r} together with "
            "router_losses_as_released, whose losses are sums over layers: set it to 'each'."
        )
