"""LoRA on the decoder's attention, dense FFNs and fused experts, through PEFT, and back to plain weights."""

import warnings
from typing import Any

from torch import nn

from ...errors import RecipeError
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...roles import role_of
from ..parallel.spread_lora import merge_spread_adapters, spread_adapters, whole_adapters
from ..recipe.recipe_parts import LoraSettings
from ..saving.sharded_tensors import is_sharded

_LINEAR_TARGETS = {
    "attention": r"self_attn\.(q|k|v|o)_proj",
    "ffn": r"mlp\.(gate|up|down)_proj",
}
_EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def add_lora(model: UniMoeForCausalLM, settings: LoraSettings) -> Any:
    """Put adapters on the roles in `settings.targets`; they train, all else is as before.

    Parameters that trained before go on training: set them with `set_trainable` first.

    Returns:
        A `peft.PeftModel` around the model. `merge_lora` gives the plain model back.
    """
    from peft import LoraConfig

    settings.check("lora")
    linear = [pattern for role, pattern in _LINEAR_TARGETS.items() if role in settings.targets]
    _require_targets(model, settings)
    fully_trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        bias="none",
        # Connectors have attention of the same names, hence the path.
        target_modules=rf".*language_model\.layers\.\d+\.({'|'.join(linear)})" if linear else [],
        target_parameters=_EXPERT_PARAMETERS if "experts" in settings.targets else None,
    )
    for name, parameter in model.named_parameters():
        if role_of(name) in settings.targets:
            parameter.requires_grad_(False)
    with whole_adapters(model):
        adapted = put_adapters(model, config)
    for name, parameter in adapted.named_parameters():
        if name.removeprefix("base_model.model.") in fully_trained:
            parameter.requires_grad_(True)
    _require_adapters(adapted, settings)
    if any(map(is_sharded, model.parameters())):
        spread_adapters(adapted)
    return adapted


def put_adapters(model: UniMoeForCausalLM, config: Any) -> Any:
    """A `peft.PeftModel` around a model, with new adapters as a `peft.LoraConfig` says."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks a property that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)


def _require_targets(model: UniMoeForCausalLM, settings: LoraSettings) -> None:
    sparse = model.config.text_config.sparse_layers
    has = {"attention": True, "experts": bool(sparse), "ffn": len(sparse) < model.config.text_config.num_hidden_layers}
    for target in settings.targets:
        if not has[target]:
            other = {
                "experts": "take 'ffn', or assemble it first",
                "ffn": "all of its layers are sparse, take 'experts'",
            }
            raise RecipeError(f"lora.targets holds {target!r} but the model has none: {other[target]}.")


def _require_adapters(adapted: nn.Module, settings: LoraSettings) -> None:
    """PEFT says nothing when one of several targets, or some of the layers, match nothing."""
    config = adapted.get_base_model().config.text_config  # type: ignore[operator]
    sparse = len(config.sparse_layers)
    wanted = {
        "attention": 4 * config.num_hidden_layers,
        "experts": 2 * sparse,
        "ffn": 3 * (config.num_hidden_layers - sparse),
    }
    adapters = [role_of(name) for name, _ in adapted.named_parameters() if ".lora_A." in name]
    for target in settings.targets:
        if adapters.count(target) != wanted[target]:
            raise RecipeError(
                f"lora.targets holds {target!r}: {wanted[target]} weights should have got adapters, {adapters.count(target)} "
                "did. The model's modules have other names than this version of PEFT looks for."
            )


def merge_lora(model: nn.Module) -> UniMoeForCausalLM:
    """Add the adapters to the weights and take PEFT away; a model without adapters is returned as it is."""
    if isinstance(model, UniMoeForCausalLM):
        return model
    if any(map(is_sharded, model.parameters())):
        return merge_spread_adapters(model)
    return model.merge_and_unload()  # type: ignore[operator]
