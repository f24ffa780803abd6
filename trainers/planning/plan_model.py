"""What the stages of a recipe train, from configurations alone: models without memory, and sizes for the memory plan."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...conversion.checkpoints.meta_model import meta_model
from ...conversion.upcycling.sparsity import sparse_config
from ...errors import RecipeError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...roles import plain_name, role_of
from ..recipe.recipe import Recipe, StageConfig
from ..stages.assembly import connector_owners, require_roles_of_experts, roles_of, trained_by
from ..stages.mixer_stage import wanted_mixers
from ..stages.moe_fit import require_fitting_moe, sparse_layers, sparsity_of
from ..stages.stage import apply_balance_terms
from ..steps.lora import add_lora
from ..steps.trainable import TrainableRow, set_trainable, trainable_table
from .memory_plan import Count, MemorySettings, ParameterSizes

_SPLIT_ROLES = ("attention", "ffn", "experts", "head")  # what tensor parallelism splits of the decoder
_TOWERS = {"image": "vision_config", "video": "vision_config", "audio": "speech_config"}


@dataclass(frozen=True)
class StageModel:
    """A stage's model: its configuration, what trains of it, and how much of what there is.

    name: of the stage, or of the one of its runs that trains most.
    """

    name: str
    config: UniMoeConfig
    table: list[TrainableRow]
    sizes: ParameterSizes
    trained_roles: frozenset[str]


def stage_models(recipe: Recipe, config: UniMoeConfig) -> list[StageModel]:
    """The model of every stage, made of the configuration of the first one's; nothing is allocated.

    Raises:
        RecipeError, ConfigurationError, ConversionError: a stage cannot be: it trains what its model does not have, or
            assembles what no model can be.
    """
    require_fitting_moe(recipe, config)
    made, trained_experts = [], 0
    for stage in recipe.stages:
        if (mixers := wanted_mixers(config.text_config, stage.train, recipe.mixers, stage.name)) is not None:
            config = copy.deepcopy(config)
            config.text_config.mixer_config = mixers
        model = meta_model(config)
        if stage.kind == "moe":
            config = assembled_config(config, recipe, trained_experts)
            model = meta_model(config)
        if stage.kind == "experts":
            trained_experts = len(stage.experts)
            made.append(_largest_expert_run(recipe, stage, model))
            continue
        apply_balance_terms(model, stage)
        made.append(_stage_model(stage.name, stage, model))
    return made


def assembled_config(dense: UniMoeConfig, recipe: Recipe, trained_experts: int = 0) -> UniMoeConfig:
    """The configuration of the model that a stage of kind "moe" assembles of so many trained experts."""
    moe = recipe.moe
    assert moe is not None  # a recipe with such a stage has it
    layers = sparse_layers(dense.text_config, moe)
    return sparse_config(dense, sparsity_of(moe, layers, moe.num_experts or trained_experts, recipe.seed))


def _stage_model(
    name: str, stage: StageConfig, model: UniMoeForCausalLM, where: Callable[[str], bool] | None = None
) -> StageModel:
    set_trainable(model, stage.train, where)
    trained: Any = model if stage.lora is None else add_lora(model, stage.lora)
    roles = frozenset(role_of(n) for n, parameter in trained.named_parameters() if parameter.requires_grad)
    return StageModel(name, model.config, trainable_table(trained), parameter_sizes(trained, stage), roles)


def _largest_expert_run(recipe: Recipe, stage: StageConfig, model: UniMoeForCausalLM) -> StageModel:
    layers = sparse_layers(model.config.text_config, recipe.moe)  # type: ignore[arg-type]
    owners = connector_owners(model, [(expert.name, expert.modalities) for expert in stage.experts])
    require_roles_of_experts(model, stage, owners, layers)
    runs = []
    for expert in stage.experts:
        trained = trained_by(expert.name, owners, layers)
        own = dataclasses.replace(stage, train=[role for role in stage.train if role in roles_of(model, trained)])
        runs.append(_stage_model(f"{stage.name}/{expert.name}", own, model, trained))
    largest = max(runs, key=lambda run: run.sizes.trained)
    return dataclasses.replace(largest, sizes=dataclasses.replace(largest.sizes, set_aside=largest.sizes.trained))


def parameter_sizes(model: nn.Module, stage: StageConfig) -> ParameterSizes:
    """Counts of a model's parameters by what parallel runs do with them."""
    totals = {kind: [0, 0] for kind in ("experts", "split", "whole", "adapters")}
    layers: dict[str, int] = {}
    experts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        role, size = role_of(name), parameter.numel()
        if ".lora_" in name:
            kind = "adapters"
        elif role == "experts" and ".shared_experts." not in name:
            kind = "experts"
        else:
            kind = "split" if role in _SPLIT_ROLES else "whole"
        totals[kind][0] += size
        totals[kind][1] += size if parameter.requires_grad else 0
        parts = plain_name(name).split(".layers.")
        if parts[0] == "model.language_model":
            layer = parts[1].partition(".")[0]
            layers[layer] = layers.get(layer, 0) + size
            experts[layer] = experts.get(layer, 0) + (size if kind == "experts" else 0)
    adapted = stage.lora is not None and "experts" in stage.lora.targets
    return ParameterSizes(
        experts=Count(*totals["experts"]),
        split=Count(*totals["split"]),
        whole=Count(*totals["whole"]),
        adapters=Count(*totals["adapters"]),
        adapted_experts=totals["experts"][0] if adapted else 0,
        largest_layer=max(layers.values(), default=0),
        layer_experts=max((experts[layer] for layer in layers if layers[layer] == max(layers.values())), default=0),
    )


def memory_settings(
    recipe: Recipe,
    stage: StageConfig,
    made: StageModel,
    rows: int,
    row_length: int,
    logits_length: int,
    media: Mapping[str, float],
) -> MemorySettings:
    """How a stage trains on one group of its samples.

    Args:
        rows, row_length, logits_length: of a batch, see `MemorySettings`.
        media: pictures, videos and clips per batch, by kind.
    """
    text = made.config.text_config
    eager = recipe.attention == "eager" or (recipe.attention == "auto" and not torch.cuda.is_available())
    head_size = text.head_dim or text.hidden_size // text.num_attention_heads
    compute = 2 if recipe.precision == "bfloat16" else 4
    ffn, copies = _mean_ffn(text)
    towers = 0 if recipe.cache is not None else _tower_activations(made, media, compute)
    return MemorySettings(
        compute_bytes=compute,
        keeps_gradients=stage.gradient_accumulation_steps > 1,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        query_size=text.num_attention_heads * head_size,
        heads=text.num_attention_heads,
        ffn_size=ffn,
        copies_per_token=copies,
        vocabulary_size=text.vocab_size,
        rows=rows,
        row_length=row_length,
        logits_length=logits_length,
        stores_scores=eager,
        checkpointing=recipe.gradient_checkpointing,
        below_decoder=bool(made.trained_roles - {"head"}),
        frozen_matrices=not made.trained_roles & {"attention", "ffn", "experts", "norms"},
        tower_activations=towers,
    )


def _mean_ffn(text: UniMoeTextConfig) -> tuple[float, float]:
    """Inner width that a token goes through, and copies of it that are made for experts, over the layers."""
    layers, sparse = text.num_hidden_layers, len(text.sparse_layers)
    dense_width = text.intermediate_size * (layers - sparse)
    if not sparse:
        return dense_width / layers, 1.0
    chosen = text.even_experts_per_token
    width = chosen * text.moe_intermediate_size + text.num_shared_experts * (text.shared_intermediate_size or 0)
    return (dense_width + sparse * width) / layers, (
        layers - sparse + sparse * (chosen + text.num_shared_experts)
    ) / layers


def _tower_activations(made: StageModel, media: Mapping[str, float], compute_bytes: int) -> int:
    """What the towers hold for a batch: one layer of frozen ones, all layers of those that train.

    Per token and layer in numbers of the compute dtype: norms, queries, keys, values and outputs 8 times the width, the
    feed-forward network twice its inner one, and the scores of all heads.
    """
    trains = "towers" in made.trained_roles
    most = 0
    for kind, count in media.items():
        tower = getattr(made.config, _TOWERS[kind], None) or made.config.audio_config
        if tower is None:
            raise RecipeError(f"The data have {kind}s, but the model has no tower for them: leave these samples out.")
        width = getattr(tower, "hidden_size", None) or tower.d_model
        inner = getattr(tower, "intermediate_size", None) or tower.encoder_ffn_dim
        heads = getattr(tower, "num_attention_heads", None) or tower.encoder_attention_heads
        layers = getattr(tower, "num_hidden_layers", None) or tower.encoder_layers
        tokens = _tower_positions(tower)
        frames = made.config.video_num_frames if kind == "video" else 1
        layer = count * frames * tokens * (8 * width + 2 * inner + heads * tokens) * compute_bytes
        most += round(layer * (layers if trains else 1))
    return most


def _tower_positions(tower: Any) -> int:
    if getattr(tower, "image_size", None):
        return (tower.image_size // tower.patch_size) ** 2 + 1
    return int(getattr(tower, "max_source_positions", None) or 1500)
