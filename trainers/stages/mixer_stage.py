"""Stages that train mixers (MoAI, arXiv 2403.07508, section 3.3), and models that have none yet.

Step 1 draws one expert per mixer for images and one for text in every forward pass, so that each learns by itself; step 2
asks the gates. Aux of images stand in the data; see `processing/auxiliary_inputs_unimoe.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ...errors import RecipeError
from ...modeling_unimoe.auxiliary_unimoe import prompt_before_answers
from ...modeling_unimoe.configuration_unimoe_moai import UniMoeMixerConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...modeling_unimoe.modeling_unimoe_moai import UniMoeCompressor, UniMoeMixer
from ...processing.auxiliary_inputs_unimoe import aux_of_conversations, spread_rows
from ..recipe.recipe_mixers import MixersConfig

MIXER_ROLES = ("compressor", "mixers", "mixer_gates")


def prepare_mixers(
    model: UniMoeForCausalLM, roles: Sequence[str], mixers: MixersConfig | None, seed: int, stage: str
) -> None:
    """Give a model its mixers where a stage trains some and there are none; see `wanted_mixers`."""
    wanted = wanted_mixers(model.config.text_config, roles, mixers, stage)
    if wanted is not None:
        add_mixers(model, wanted, seed)


def wanted_mixers(
    text: UniMoeTextConfig, roles: Sequence[str], mixers: MixersConfig | None, stage: str
) -> UniMoeMixerConfig | None:
    """The mixers that a model lacks for a stage; None where it lacks none.

    Raises:
        RecipeError: neither the model nor the recipe has mixers.
        ConfigurationError: they do not go with the model's sizes.
    """
    if text.mixer_config is not None or not set(roles) & set(MIXER_ROLES):
        return None
    if mixers is None:
        raise RecipeError(
            f"The stage {stage!r} trains mixers, but neither the model nor the recipe has any: add a mixers section, "
            "such as mixers: {layers: [7, 15, 23, 31]}."
        )
    wanted = UniMoeMixerConfig(**asdict(mixers))
    wanted.require_fit(text.hidden_size, text.num_hidden_layers)
    return wanted


def add_mixers(model: UniMoeForCausalLM, mixer: UniMoeMixerConfig | Mapping[str, Any], seed: int = 0) -> None:
    """Give a model in memory mixers and their compressor, newly drawn; everything else stays as it is.

    Raises:
        ConfigurationError: they do not go with the model's sizes.
        RecipeError: the model has mixers.
    """
    text = model.config.text_config
    if text.mixer_config is not None:
        raise RecipeError(f"The model has mixers already, in layers {text.mixer_config.layers}: train those.")
    config = UniMoeMixerConfig(**mixer) if isinstance(mixer, Mapping) else mixer
    config.require_fit(text.hidden_size, text.num_hidden_layers)
    text.mixer_config = model.model.language_model.config.mixer_config = config
    reference: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, layer in enumerate(config.layers or ()):
            made = UniMoeMixer(model.model.language_model.config, number)
            model.model.language_model.layers[layer].mixer = _drawn(made, model).to(reference.device, reference.dtype)
        compressor = _drawn(UniMoeCompressor(config, text.hidden_size), model)
        model.model.aux_compressor = compressor.to(reference.device, reference.dtype)


def choose_experts(model: UniMoeForCausalLM, choice: str) -> None:
    """How the mixers of a model choose in training: "random" or "gates"."""
    mixer = model.config.text_config.mixer_config
    if mixer is not None:
        mixer.expert_choice = choice


def aux_of_samples(processor: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Aux inputs of a batch, from the images of its samples; empty where none has aux."""
    return aux_of_conversations(processor, [sample.get("messages") for sample in samples])


def spread_aux(inputs: dict[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Inputs of the conversations in a batch, with rows without aux for its plain texts."""
    rows = [index for index, sample in enumerate(samples) if "messages" in sample]
    aux = {name: value for name, value in inputs.items() if name.startswith("aux_")}
    return inputs if len(rows) == len(samples) else inputs | spread_rows(aux, rows, len(samples))


def with_prompt(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that says, where it has aux, what is prompt: answers never enter the mixers."""
    if not any(name.startswith("aux_") for name in batch):
        return batch
    prompt = prompt_before_answers(batch["labels"]) & batch["attention_mask"].bool()
    return {**batch, "prompt_mask": prompt.long()}


def _drawn(module: nn.Module, model: UniMoeForCausalLM) -> nn.Module:
    """The module with weights as those that a new model of this kind gets."""
    for inner in reversed(list(module.modules())):  # parts before what holds them
        model.model.language_model._init_weights(inner)
    return module


__all__ = [
    "MIXER_ROLES",
    "add_mixers",
    "aux_of_samples",
    "choose_experts",
    "prepare_mixers",
    "spread_aux",
    "wanted_mixers",
    "with_prompt",
]
