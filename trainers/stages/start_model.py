"""What a recipe starts from: its model with the recipe's implementations, and its processor."""

from pathlib import Path
from typing import Any

import torch

from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..parallel.parallel_run import load_spread
from ..planning.plan import require_model_folder
from ..recipe.recipe import Recipe
from .stage_processor import open_processor


def load_start_model(folder: str | Path, recipe: Recipe) -> UniMoeForCausalLM:
    """A model in float32 with the recipe's implementations of attention and experts, spread as the recipe says."""
    return with_implementations(load_spread(folder, recipe.parallel), recipe)


def with_implementations(model: UniMoeForCausalLM, recipe: Recipe) -> UniMoeForCausalLM:
    attention = recipe.attention
    if attention == "auto":
        # The backward pass of CPU flash attention is slow at the short sequences of training.
        attention = "sdpa" if torch.cuda.is_available() else "eager"
    model.model.language_model.set_attn_implementation(attention)
    if recipe.experts_implementation is not None and model.config.text_config.sparse_layers:
        model.set_experts_implementation(recipe.experts_implementation)
    return model


def load_processor(folder: str) -> Any:
    require_model_folder(folder)
    return open_processor(folder)
