"""Whether a recipe's `moe` section fits its model, found out before the first stage trains for hours."""

from pathlib import Path

from ...conversion.checkpoints.our_folder import read_our_config
from ...conversion.upcycling.sparsity import Sparsity, sparse_text_config
from ...errors import ConfigurationError, ConversionError, RecipeError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..recipe.recipe import Recipe
from ..recipe.recipe_parts import MoeConfig


def require_fitting_moe(recipe: Recipe, config: UniMoeConfig | None = None) -> None:
    """Raise RecipeError if the model cannot become what the recipe's `moe` section says.

    Args:
        config: of the model that the first stage starts from; read from `recipe.model` when None, and where that is no
            folder yet nothing is checked.
    """
    kinds = {stage.kind for stage in recipe.stages}
    if recipe.moe is None or kinds == {"train"}:
        return
    if config is None:
        if not (Path(recipe.model) / "config.json").is_file():
            return
        config = read_our_config(Path(recipe.model))
    layers = sparse_layers(config.text_config, recipe.moe)
    if "moe" not in kinds:
        return
    trained = [len(stage.experts) for stage in recipe.stages if stage.experts] or [0]
    sparsity = sparsity_of(recipe.moe, layers, recipe.moe.num_experts or trained[-1], recipe.seed)
    try:
        sparse_text_config(config.text_config, sparsity)
    except (ConfigurationError, ConversionError) as error:
        raise RecipeError(f"The recipe's moe section does not fit its model: {error}") from error


def sparse_layers(text: UniMoeTextConfig, moe: MoeConfig) -> list[int]:
    """The layers that become sparse. Raises RecipeError if the decoder lacks one of them."""
    count = text.num_hidden_layers
    layers = list(range(count)) if moe.sparse_layers is None else sorted(moe.sparse_layers)
    if layers[0] < 0 or layers[-1] >= count or len(set(layers)) != len(layers):
        raise RecipeError(
            f"moe.sparse_layers is {moe.sparse_layers}; this model has layers 0 to {count - 1}, each may stand once."
        )
    return layers


def sparsity_of(moe: MoeConfig, layers: list[int], num_experts: int, seed: int) -> Sparsity:
    """What the dense model becomes. "modality_means" is said by rows that are computed, and "normal" here."""
    return Sparsity(
        num_experts=num_experts,
        num_experts_per_tok=moe.num_experts_per_tok,
        sparse_layers=layers,
        expert_groups=moe.expert_groups,
        modality_groups=moe.modality_groups,
        router_init="normal" if moe.router_init == "modality_means" else moe.router_init,
        routing={
            **(moe.routing or {}),
            "router_jitter_noise": moe.router_jitter_noise,
            "modality_experts": moe.modality_experts,
        },
        seed=seed,
    )
