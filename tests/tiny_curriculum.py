"""A curriculum of four stages, as small as learning allows."""

from pathlib import Path
from typing import Any

from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_parts import ExpertConfig, LoraSettings, MoeConfig

SPARSE_LAYERS = [0, 2]
LANGUAGE = ["embeddings", "attention", "ffn", "norms", "head"]
EXPERTS = [
    ExpertConfig("image", ["image"]),
    ExpertConfig("audio", ["speech", "sound"]),
    ExpertConfig("text", ["text"]),
]


def recipe(start: Path, out: Path, factor: float = 1.0, **overrides: Any) -> Recipe:
    """Four stages; `factor` scales their steps."""

    def steps(count: int) -> int:
        return max(1, round(count * factor))

    common: dict[str, Any] = {
        "batch_size": 8,
        "learning_rate": 1e-2,
        "log_every": 2,
        "save_every": 2 if factor < 1 else 20,
    }
    fields = {
        "model": str(start / "model"),
        "data": [str(start / "train.jsonl")],
        "out": str(out),
        "cache": str(start / "cache"),
        "moe": MoeConfig(sparse_layers=SPARSE_LAYERS),
        "stages": [
            StageConfig("language", train=LANGUAGE, modalities=["text"], steps=steps(50), **common),
            StageConfig(
                "connectors",
                train=["connectors", "aligners"],
                modalities=["image", "speech", "sound"],
                steps=steps(100),
                **common,
            ),
            StageConfig(
                "experts", "experts", ["ffn", "connectors", "aligners"], experts=EXPERTS, steps=steps(10), **common
            ),
            StageConfig(
                "mixture",
                "moe",
                ["router", "connectors"],
                lora=LoraSettings(rank=4),
                steps=steps(60),
                router_aux_loss_coef=0.01,
                feature_noise=0.05,
                **common,
            ),
        ],
    }
    return Recipe(**{**fields, **overrides})
