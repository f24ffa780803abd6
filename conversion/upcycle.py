"""Upcycling: a dense decoder becomes a sparse one that starts as the same function.

Every expert of a sparse layer starts as a copy of the layer's dense FFN, or as an FFN given for it, and the mixing
weights of a token sum to one; with copies the sparse model therefore equals the dense one whatever its router says
(Sparse Upcycling, arXiv 2212.05055, section 3). With given FFNs it starts as a mixture of them (Branch-Train-MiX,
arXiv 2403.07816, section 2.2; Uni-MoE's third stage, arXiv 2405.11273, section 3.4).

The functions on single layers work on tensors, so that models in memory and checkpoints on disk share them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from ..errors import ConversionError
from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM

RouterInit = Literal["normal", "zeros"]
FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LANGUAGE_PREFIX = "model.language_model."


@dataclass(frozen=True)
class Sparsity:
    """What the dense decoder becomes; field names are those of `UniMoeTextConfig`.

    Args:
        router_init: "normal" draws gate rows with the configuration's `initializer_range`. "zeros" sends all tokens to
            the same k experts with equal weights: with copied FFNs not even rounding changes, but nothing spreads
            the tokens until training moves the router.
        routing: further `UniMoeTextConfig` fields, e.g. {"router_aux_loss_coef": 0.01}.
        seed: of the gate rows; layer i draws from a generator of its own.
    """

    num_experts: int
    num_experts_per_tok: int
    sparse_layers: tuple[int, ...]
    expert_groups: dict[str, list[int]] | None = None
    modality_groups: dict[str, str] | None = None
    router_init: RouterInit = "normal"
    routing: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def upcycle_model(
    dense: UniMoeForCausalLM,
    *,
    num_experts: int,
    num_experts_per_tok: int,
    sparse_layers: Sequence[int],
    expert_groups: dict[str, list[int]] | None = None,
    modality_groups: dict[str, str] | None = None,
    expert_ffns: Sequence[Mapping[str, torch.Tensor]] | None = None,
    router_init: RouterInit = "normal",
    router_rows: Mapping[int, torch.Tensor] | None = None,
    routing: dict[str, Any] | None = None,
    seed: int = 0,
) -> UniMoeForCausalLM:
    """A sparse model with the weights of a dense one; nothing is shared between the two.

    Args:
        dense: the model, with or without towers. Its dtype, device, mode and generation settings are kept.
        expert_ffns: one mapping per expert from "layers.{i}.mlp.{gate,up,down}_proj.weight" to the tensor of the
            dense layout, for every sparse layer i; None copies the dense FFN into every expert.
        router_rows: layer -> gate rows [R, H] in the order of `UniMoeTextConfig.router_groups`, for layers whose
            router shall not be drawn; R is the number of experts when there is one group.
        num_experts, num_experts_per_tok, sparse_layers, expert_groups, modality_groups, router_init, routing, seed:
            see `Sparsity`.

    Raises:
        ConversionError: a layer is already sparse, or tensors are missing or have the wrong shape.
        ConfigurationError: the sparsity itself is impossible.
    """
    sparsity = Sparsity(
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        sparse_layers=tuple(sorted(sparse_layers)),
        expert_groups=expert_groups,
        modality_groups=modality_groups,
        router_init=router_init,
        routing=dict(routing or {}),
        seed=seed,
    )
    config = sparse_config(dense.config, sparsity)
    text_config = config.text_config
    _check_expert_ffns(expert_ffns, text_config)
    state = {name: tensor.detach().clone() for name, tensor in dense.state_dict().items()}
    for layer in sparsity.sparse_layers:
        ffn = pop_dense_ffn(state, layer, LANGUAGE_PREFIX)
        experts = [ffn] * num_experts if expert_ffns is None else [_given_ffn(e, layer, ffn) for e in expert_ffns]
        rows = (router_rows or {}).get(layer)
        state |= sparse_layer_tensors(text_config, sparsity, layer, experts, rows, LANGUAGE_PREFIX)
    return _build(dense, config, state)


def sparse_config(dense: UniMoeConfig, sparsity: Sparsity) -> UniMoeConfig:
    """The configuration of the sparse model; only the decoder's part differs."""
    fields = dense.to_dict()
    fields["text_config"] = sparse_text_config(dense.text_config, sparsity).to_dict()
    return UniMoeConfig(**{name: value for name, value in fields.items() if name != "model_type"})


def sparse_text_config(dense: UniMoeTextConfig, sparsity: Sparsity) -> UniMoeTextConfig:
    """The decoder's configuration, with `sparsity` in it. Raises ConversionError when the source is sparse already."""
    if dense.sparse_layers:
        raise ConversionError(
            f"The source already has {dense.num_experts} experts in layers {dense.sparse_layers}; "
            "upcycling starts from a dense model. Give the dense model it was made from."
        )
    if not sparsity.sparse_layers:
        raise ConversionError("The list of layers to make sparse is empty: name at least one.")
    fields = dense.to_dict() | {
        "num_experts": sparsity.num_experts,
        "num_experts_per_tok": sparsity.num_experts_per_tok,
        "moe_intermediate_size": dense.intermediate_size,
        "sparse_layers": list(sparsity.sparse_layers),
        "expert_groups": sparsity.expert_groups,
        "modality_groups": sparsity.modality_groups,
        **sparsity.routing,
    }
    fields.pop("model_type", None)
    config = UniMoeTextConfig(**fields)
    for name in ("num_null_experts", "num_shared_experts"):
        if getattr(config, name):
            raise ConversionError(
                f"The routing asks for {name} {getattr(config, name)}, with which the sparse model cannot start as "
                "the dense one: upcycling makes routed experts only. Leave it out."
            )
    return config


def sparse_layer_tensors(
    config: UniMoeTextConfig,
    sparsity: Sparsity,
    layer: int,
    experts: Sequence[Mapping[str, torch.Tensor]],
    router_rows: torch.Tensor | None = None,
    prefix: str = "",
) -> dict[str, torch.Tensor]:
    """The tensors that replace one layer's dense FFN.

    Args:
        experts: per expert "gate_proj" and "up_proj" [I, H] and "down_proj" [H, I].
        router_rows: gate rows [R, H]; drawn by `sparsity.router_init` when None.

    Returns:
        `{prefix}layers.{layer}.mlp.` + "gate.weight" [R, H], "experts.gate_up_proj" [E, 2I, H] and
        "experts.down_proj" [E, H, I], in the dtype of the experts.
    """
    down = experts[0]["down_proj"]
    rows = initial_router_rows(config, sparsity, layer) if router_rows is None else router_rows
    expected = (config.num_gate_rows, config.hidden_size)
    if tuple(rows.shape) != expected:
        raise ConversionError(f"Router rows of layer {layer} have shape {tuple(rows.shape)}; {expected} is needed.")
    intermediate = config.moe_intermediate_size
    gate_up = down.new_empty(config.num_experts, 2 * intermediate, config.hidden_size)
    for target, ffn in zip(gate_up, experts, strict=True):
        target[:intermediate] = ffn["gate_proj"]
        target[intermediate:] = ffn["up_proj"]
    mlp = f"{prefix}layers.{layer}.mlp."
    return {
        mlp + "gate.weight": rows.detach().to(down.device, down.dtype).clone(),
        mlp + "experts.gate_up_proj": gate_up,
        mlp + "experts.down_proj": torch.stack([ffn["down_proj"] for ffn in experts]),
    }


def initial_router_rows(config: UniMoeTextConfig, sparsity: Sparsity, layer: int) -> torch.Tensor:
    """Gate rows [R, H] in float32; the same for the same seed and layer, whatever else is converted."""
    shape = (config.num_gate_rows, config.hidden_size)
    if sparsity.router_init == "zeros":
        return torch.zeros(shape)
    if sparsity.router_init != "normal":
        raise ConversionError(f"router_init is {sparsity.router_init!r}; it must be 'normal' or 'zeros'.")
    generator = torch.Generator().manual_seed(sparsity.seed * 1_000_003 + layer)
    return torch.randn(shape, generator=generator) * config.initializer_range


def pop_dense_ffn(state: dict[str, torch.Tensor], layer: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Take the dense FFN of a layer out of a state dict: projection name -> tensor."""
    return {name: state.pop(f"{prefix}layers.{layer}.mlp.{name}.weight") for name in FFN_PROJECTIONS}


def _check_expert_ffns(expert_ffns: Sequence[Mapping[str, torch.Tensor]] | None, config: UniMoeTextConfig) -> None:
    if expert_ffns is not None and len(expert_ffns) != config.num_experts:
        raise ConversionError(
            f"expert_ffns holds {len(expert_ffns)} experts but num_experts is {config.num_experts}: give one each."
        )


def _given_ffn(
    expert: Mapping[str, torch.Tensor], layer: int, dense: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """One expert's FFN of a layer, in the dtype and on the device of the dense one."""
    ffn = {}
    for name in FFN_PROJECTIONS:
        key = f"layers.{layer}.mlp.{name}.weight"
        if key not in expert:
            raise ConversionError(f"An entry of expert_ffns lacks {key}: give every projection of every sparse layer.")
        if expert[key].shape != dense[name].shape:
            raise ConversionError(
                f"expert_ffns' {key} has shape {tuple(expert[key].shape)}; the dense FFN has "
                f"{tuple(dense[name].shape)}, which every expert needs."
            )
        ffn[name] = expert[key].detach().to(dense[name])
    return ffn


def _build(dense: UniMoeForCausalLM, config: UniMoeConfig, state: dict[str, torch.Tensor]) -> UniMoeForCausalLM:
    # The towers' implementations stay out of it: not every tower has the decoder's.
    attention = dense.config.text_config._attn_implementation
    config._attn_implementation = {"": attention, "text_config": attention}
    with no_init_weights():
        sparse = UniMoeForCausalLM(config)
    sparse.load_state_dict(state, assign=True)
    sparse.tie_weights()
    sparse.to(dense.device)  # type: ignore[arg-type]
    sparse.generation_config = GenerationConfig(**dense.generation_config.to_dict())
    return sparse.train(dense.training)
