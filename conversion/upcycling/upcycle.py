"""Upcycling: a dense decoder becomes a sparse one that starts as the same function.

Every expert of a sparse layer starts as a copy of the layer's dense FFN, or as an FFN given for it, and the mixing
weights of a token sum to one; with copies the sparse model therefore equals the dense one whatever its router says
(Sparse Upcycling, arXiv 2212.05055, section 3). With given FFNs it starts as a mixture of them (Branch-Train-MiX,
arXiv 2403.07816, section 2.2; Uni-MoE's third stage, arXiv 2405.11273, section 3.4).

The functions on single layers work on tensors, so that models in memory and checkpoints on disk share them. Other ways
to start experts and routers are in `expert_init` and `router_init`.
"""

from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from .expert_init import routed_projection, shared_projection
from .router_init import initial_router_rows
from .sparsity import Sparsity, sparse_config

FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LANGUAGE_PREFIX = "model.language_model."


def upcycle_model(
    dense: UniMoeForCausalLM,
    sparsity: Sparsity,
    *,
    expert_ffns: Sequence[Mapping[str, torch.Tensor]] | None = None,
    router_rows: Mapping[int, torch.Tensor] | None = None,
) -> UniMoeForCausalLM:
    """A sparse model with the weights of a dense one; nothing is shared between the two.

    Args:
        dense: the model, with or without towers. Its dtype, device, mode and generation settings are kept.
        sparsity: what it becomes; `exactness` says whether it starts as the dense model.
        expert_ffns: one mapping per expert from "layers.{i}.mlp.{gate,up,down}_proj.weight" to the tensor of the
            dense layout, for every sparse layer i; None copies the dense FFN into every expert.
        router_rows: layer -> gate rows [R, H] in the order of `UniMoeTextConfig.router_groups`, for layers whose
            router shall not be drawn; R is the number of experts when there is one group.

    Raises:
        ConversionError: a layer is already sparse, or tensors are missing or have the wrong shape.
        ConfigurationError: the sparsity itself is impossible.
    """
    config = sparse_config(dense.config, sparsity)
    text_config = config.text_config
    _check_expert_ffns(expert_ffns, sparsity)
    state = {name: tensor.detach().clone() for name, tensor in dense.state_dict().items()}
    for layer in sparsity.sparse_layers:
        ffn = pop_dense_ffn(state, layer, LANGUAGE_PREFIX)
        if expert_ffns is None:
            experts = [_routed_ffn(ffn, sparsity, layer, expert) for expert in range(sparsity.num_experts)]
        else:
            experts = [_given_ffn(e, layer, ffn) for e in expert_ffns]
        rows = (router_rows or {}).get(layer)
        state |= sparse_layer_tensors(text_config, sparsity, layer, experts, rows, LANGUAGE_PREFIX)
        if text_config.num_shared_experts:
            shared = {name: shared_projection(tensor, name, text_config) for name, tensor in ffn.items()}
            name = f"{LANGUAGE_PREFIX}layers.{layer}.mlp.shared_experts."
            state |= fused_experts(name, [shared] * text_config.num_shared_experts)
    return _build(dense, config, state)


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
    if len(experts) != config.num_experts:
        raise ConversionError(f"There are {len(experts)} FFNs for {config.num_experts} experts: give one each.")
    down = experts[0]["down_proj"]
    rows = initial_router_rows(config, sparsity, layer) if router_rows is None else router_rows
    expected = (config.num_gate_rows, config.hidden_size)
    if tuple(rows.shape) != expected:
        raise ConversionError(f"Router rows of layer {layer} have shape {tuple(rows.shape)}; {expected} is needed.")
    mlp = f"{prefix}layers.{layer}.mlp."
    return {
        mlp + "gate.weight": rows.detach().to(down.device, down.dtype).clone(),
        **{mlp + name: bias.to(down.device) for name, bias in initial_biases(config).items()},
        **fused_experts(mlp + "experts.", experts),
    }


def initial_biases(config: UniMoeTextConfig) -> dict[str, torch.Tensor]:
    """The biases of loss-free balancing below a layer's `mlp.`, float32 zeros; none without it."""
    if not config.router_bias_update_rate:
        return {}
    return {"gate.choice_bias_C": torch.zeros(config.num_gate_rows - config.num_shared_experts)}


def fused_experts(prefix: str, experts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`prefix` + "gate_up_proj" [E, 2I, H] (gate rows first) and "down_proj" [E, H, I] of E FFNs of the same width."""
    first = experts[0]["gate_proj"]
    inner = first.shape[0]
    gate_up = first.new_empty(len(experts), 2 * inner, first.shape[1])
    for target, ffn in zip(gate_up, experts, strict=True):
        target[:inner] = ffn["gate_proj"]
        target[inner:] = ffn["up_proj"]
    return {prefix + "gate_up_proj": gate_up, prefix + "down_proj": torch.stack([ffn["down_proj"] for ffn in experts])}


def pop_dense_ffn(state: dict[str, torch.Tensor], layer: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Take the dense FFN of a layer out of a state dict: projection name -> tensor."""
    return {name: state.pop(f"{prefix}layers.{layer}.mlp.{name}.weight") for name in FFN_PROJECTIONS}


def _routed_ffn(
    ffn: Mapping[str, torch.Tensor], sparsity: Sparsity, layer: int, expert: int
) -> dict[str, torch.Tensor]:
    projected = {name: routed_projection(tensor, name, sparsity, layer, expert) for name, tensor in ffn.items()}
    return {name: tensor.to(ffn[name].dtype) for name, tensor in projected.items()}


def _check_expert_ffns(expert_ffns: Sequence[Mapping[str, torch.Tensor]] | None, sparsity: Sparsity) -> None:
    if expert_ffns is None:
        return
    if len(expert_ffns) != sparsity.num_experts:
        raise ConversionError(
            f"expert_ffns holds {len(expert_ffns)} experts but num_experts is {sparsity.num_experts}: give one each."
        )
    if sparsity.granularity > 1 or sparsity.noise or sparsity.drop_ratio:
        raise ConversionError("expert_ffns are taken as they are: leave granularity, noise and drop_ratio out.")


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
