"""Stage 2 to stage 3: what an expert's run leaves behind, and the sparse model that is made of it."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...conversion.upcycling.upcycle import upcycle_model
from ...errors import CheckpointError, RecipeError
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...roles import role_of
from ..parallel.ranks import is_first
from ..recipe.recipe import StageConfig
from ..recipe.recipe_parts import ExpertConfig, MoeConfig
from ..saving.sharded_tensors import reshard, whole_tensor
from .moe_fit import sparse_layers, sparsity_of

EXPERT_FILE = "expert.safetensors"
CONNECTORS_FILE = "connectors.safetensors"
ROUTER_MEANS_FILE = "router_means.safetensors"
_LANGUAGE = "model.language_model."
# Means of fewer batches than this wobble; more cost time and change nothing.
_MEAN_BATCHES = 8


def connector_owners(model: UniMoeForCausalLM, experts: Sequence[tuple[str, Iterable[str]]]) -> dict[str, str]:
    """Which expert's run trains which connector: connector -> expert name.

    Args:
        experts: name and modalities of every expert, in order. A connector belongs to the first expert that has its
            modality; without a video connector, the image connector serves videos but belongs to images first.
    """
    owners: dict[str, str] = {}
    for name, modalities in experts:
        for modality in modalities:
            connector = f"{modality}_connector"
            if getattr(model.config, connector, None) is not None:
                owners.setdefault(connector, name)
    is_shared = model.config.image_connector is not None and model.config.video_connector is None
    if is_shared and "image_connector" not in owners:
        for name, modalities in experts:
            if "video" in modalities:
                owners["image_connector"] = name
                break
    return owners


def trained_by(name: str, owners: dict[str, str], layers: Sequence[int]) -> Callable[[str], bool]:
    """Whether an expert's run trains a parameter: FFNs of the sparse layers, and the connectors that it owns."""
    prefixes = tuple(f"{_LANGUAGE}layers.{layer}.mlp." for layer in layers)
    prefixes += tuple(f"model.{connector}." for connector, owner in owners.items() if owner == name)
    return lambda parameter: parameter.startswith(prefixes)


def save_expert(model: UniMoeForCausalLM, folder: Path, trained: Callable[[str], bool]) -> None:
    """Write the tensors that an expert's run trained: the FFNs, and its connectors."""
    reshard(model)
    ffn, connectors = {}, {}
    for name, parameter in model.named_parameters():
        if trained(name):
            tensor = whole_tensor(parameter.detach()).cpu().contiguous()
            if name.startswith(_LANGUAGE):
                ffn[name.removeprefix(_LANGUAGE)] = tensor
            else:
                connectors[name.removeprefix("model.")] = tensor
    if is_first():
        save_file(connectors, folder / CONNECTORS_FILE)
        save_file(ffn, folder / EXPERT_FILE)


@torch.no_grad()
def save_router_means(
    model: UniMoeForCausalLM, batches: Iterable[dict[str, Any]], layers: Sequence[int], folder: Path
) -> None:
    """Write the mean FFN input [H] of every given layer over the tokens of some batches (padding left out)."""
    sums = {layer: torch.zeros(model.config.text_config.hidden_size, dtype=torch.float64) for layer in layers}
    count, mask = 0, torch.empty(0)

    def collect(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            sums[layer] += arguments[0][mask].double().sum(0).cpu()

        return hook

    decoder_layers = model.model.language_model.layers
    hooks = [decoder_layers[layer].mlp.register_forward_pre_hook(collect(layer)) for layer in layers]
    try:
        for _, batch in zip(range(_MEAN_BATCHES), batches, strict=False):
            inputs = {name: v.to(model.device) for name, v in batch.items() if isinstance(v, torch.Tensor)}
            inputs.pop("labels")
            inputs |= {name: v for name, v in batch.items() if name in ("max_length_q", "max_length_k")}
            mask = inputs["attention_mask"].bool()
            count += int(mask.sum())
            model(**inputs, logits_to_keep=1, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    means = {f"layers.{layer}": (total / max(count, 1)).float() for layer, total in sums.items()}
    if is_first():
        save_file(means, folder / ROUTER_MEANS_FILE)


def router_rows_from_means(means: Sequence[dict[str, torch.Tensor]], scale: float) -> dict[int, torch.Tensor]:
    """Gate rows [E, H] per layer from one mapping "layers.{i}" -> mean router input [H] per expert.

    Row e points from the mean of all experts to that of expert e, d_e, and has the length at which the logit of expert
    e grows by `scale` along d_e: scale * d_e / |d_e|^2.
    """
    rows = {}
    for key in means[0]:
        stacked = torch.stack([mean[key].float() for mean in means])
        directions = stacked - stacked.mean(dim=0)
        lengths = directions.square().sum(dim=1, keepdim=True)
        # Experts of the same data have no direction; they get a zero row rather than noise blown up.
        floor = 1e-6 * stacked.square().sum(dim=1, keepdim=True) + 1e-12
        rows[int(key.rpartition(".")[2])] = torch.where(
            lengths > floor, scale * directions / lengths.clamp(min=1e-12), 0.0
        )
    return rows


def assemble(dense: UniMoeForCausalLM, moe: MoeConfig, expert_folders: Sequence[Path], seed: int) -> UniMoeForCausalLM:
    """The sparse model: experts and connectors from their runs, all else from the dense model.

    Without expert folders every expert is a copy of the dense FFN.
    """
    layers = sparse_layers(dense.config.text_config, moe)
    for folder in expert_folders:
        _load_connectors(dense, folder / CONNECTORS_FILE)
    rows = None
    if moe.router_init == "modality_means":
        means = [load_file(folder / ROUTER_MEANS_FILE) for folder in expert_folders]
        rows = router_rows_from_means(means, moe.router_init_scale)
    return upcycle_model(
        dense,
        sparsity_of(moe, layers, moe.num_experts or len(expert_folders), seed),
        expert_ffns=[load_file(folder / EXPERT_FILE) for folder in expert_folders] or None,
        router_rows=rows,
    )


def require_roles_of_experts(
    model: UniMoeForCausalLM, stage: StageConfig, owners: dict[str, str], layers: Sequence[int]
) -> None:
    """Raises RecipeError if a stage of kind "experts" trains what would not go into the sparse model."""
    found = set().union(*(roles_of(model, trained_by(e.name, owners, layers)) for e in stage.experts))
    if wrong := sorted(set(stage.train) - found) or (["LoRA"] if stage.lora else []):
        raise RecipeError(
            f"The stage {stage.name!r} of kind 'experts' trains {wrong}; here it can train {sorted(found)}, because "
            "nothing else of its runs goes into the sparse model."
        )


def roles_of(model: UniMoeForCausalLM, trained: Callable[[str], bool]) -> set[str]:
    """The roles of the parameters whose names `trained` accepts."""
    return {role_of(name) for name, _ in model.named_parameters() if trained(name)}


def expert_modalities(dataset: Any, expert: ExpertConfig) -> set[str]:
    """Modalities of an expert's samples, which it may have named by task."""
    return {sample["modality"] for sample in dataset.select(expert.modalities).samples}


@torch.no_grad()
def _load_connectors(model: UniMoeForCausalLM, file: Path) -> None:
    parameters = dict(model.model.named_parameters())
    for name, tensor in load_file(file).items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise CheckpointError(f"{file} holds {name}, which does not fit the model: delete the stage and rerun it.")
        parameters[name].copy_(tensor)
