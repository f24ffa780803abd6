"""The planned activations against what autograd really keeps of a forward pass."""

from typing import Any

import pytest
import tiny
import tiny_training
import torch

from unimoe import UniMoeConfig, UniMoeForCausalLM
from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.planning.memory_plan import kept_activations
from unimoe.trainers.planning.plan_model import memory_settings, stage_models
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.steps.trainable import set_trainable

TOLERANCE = 0.25
TEXT = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
}
DENSE = {**TEXT, "num_experts": 0, "sparse_layers": []}
SPARSE = {**TEXT, "num_experts": 4, "sparse_layers": [0, 1, 2, 3, 4], "moe_intermediate_size": 88}
ROLES = ["embeddings", "attention", "norms", "head"]
CASES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (DENSE, {"attention": "eager"}, [*ROLES, "ffn"]),
    (DENSE, {"attention": "sdpa"}, [*ROLES, "ffn"]),
    (DENSE, {"attention": "sdpa", "precision": "bfloat16"}, [*ROLES, "ffn"]),
    (DENSE, {"attention": "sdpa", "gradient_checkpointing": True}, [*ROLES, "ffn"]),
    (SPARSE, {"attention": "sdpa"}, [*ROLES, "router", "experts"]),
    (SPARSE, {"attention": "sdpa"}, ["router"]),
]


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    texts = [tiny_training.sample("text", i, None, "Say red please now. " * 10, "blue green") for i in range(4)]
    return RawCollator(tiny_training.processor())(texts)


def kept(model: torch.nn.Module, batch: dict[str, Any], precision: str) -> int:
    """Bytes of the tensors that a forward pass keeps, each memory once, without the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    alive = []  # what is freed meanwhile could be counted twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs = {name: v for name, v in batch.items() if name not in ("labels", "sample_ids", "group")}
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False),
    ):
        logits = model(**inputs, use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.zeros(logits.shape[:2].numel(), dtype=torch.long)
        )
    return sum(found.values())


@pytest.mark.parametrize(("text", "options", "train"), CASES)
def test_activations_are_what_autograd_keeps(
    text: dict[str, Any], options: dict[str, Any], train: list[str], batch: dict[str, Any]
) -> None:
    config = UniMoeConfig(text_config=tiny.text_config(**text))
    stage = StageConfig("one", train=train)
    recipe = Recipe(model="start", data=["a"], out="out", stages=[stage], **options)
    (made,) = stage_models(recipe, config)
    rows, length = batch["input_ids"].shape
    settings = memory_settings(recipe, stage, made, rows, length, batch["logits_to_keep"], {})
    model = UniMoeForCausalLM(config).train()
    set_trainable(model, train)
    model.model.language_model.set_attn_implementation(options["attention"])
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    measured = kept(model, batch, recipe.precision)
    assert abs(kept_activations(settings) / measured - 1) < TOLERANCE
