"""The quickstart's recipe: language, then Uni-MoE's three stages, with budgets for two CPU cores."""

from pathlib import Path
from typing import Any

from ..starter_corpus.corpus import corpus_root
from ..trainers.recipe.recipe import Recipe, StageConfig
from ..trainers.recipe.recipe_data import DataEntry
from ..trainers.recipe.recipe_parts import ExpertConfig, LoraSettings, MoeConfig
from .schedule import EXPERT_EFFORT, Budget

# Expert e of every sparse layer starts as the FFN that learned these modalities.
EXPERTS = {"image": ["image"], "speech": ["speech"], "sound": ["sound"], "video_text": ["video", "text"]}
# Speech, sounds and what moves are learned in stage 1; pictures and motion need the most.
MIX = {"image": 4.0, "speech": 1.0, "sound": 1.0, "video_direction": 9.0, "video_object": 1.5, "text": 1.5}
STAGE1_MIX = {"image": 5.0, "speech": 2.5, "sound": 1.5, "video_direction": 0.5, "video_object": 2.0}
# Answering from a description in words is what the connectors build on, so it gets half of stage 0.
LANGUAGE_MIX = {
    "plain_text": 3.0,
    "text": 2.0,
    "text/image": 1.2,
    "text/speech": 1.2,
    "text/sound": 0.8,
    "text/video_direction": 0.8,
    "text/video_object": 1.2,
}
NOISE = {"image": 0.5, "video": 0.3, "speech": 0.1, "sound": 0.4}
DROPOUT = {"image": 0.15, "speech": 0.05, "sound": 0.1}
IMAGE_VARIANTS = 12
EXPERTS_PER_TOKEN = 2
# What the accuracy after a stage is called in the report.
MOMENTS = {"stage0": "after stage 0", "stage1": "after stage 1", "stage2": "before stage 3"}
COMMON: dict[str, Any] = {
    "batch_size": 32,
    "adam_betas": [0.9, 0.98],
    "weight_decay": 0.01,
    "min_learning_rate_ratio": 0.03,
    "feature_noise": NOISE,
    "token_dropout": DROPOUT,
    "save_every": 200,
}


def sparse_layers(num_layers: int) -> list[int]:
    """Every second layer is sparse."""
    return list(range(1, num_layers, 2))


def language_recipe(start: Path, work: Path, seed: int, budget: Budget, precision: str) -> Recipe:
    """Stage 0: a decoder that starts from nothing learns the corpus's English."""
    stage = StageConfig(
        name="stage0",
        train=["embeddings", "attention", "ffn", "norms"],
        steps=budget.language,
        time_limit_seconds=budget.limit("stage0"),
        learning_rate=2e-3,
        warmup_steps=30,
        modality_weights=LANGUAGE_MIX,
        **{**COMMON, "batch_size": 48},
    )
    data = [str(corpus_root() / "stage0.jsonl")]
    out = str(work / "language")
    return Recipe(model=str(start), data=data, out=out, seed=seed, stages=[stage], precision=precision)  # type: ignore[arg-type]


def multimodal_recipe(start: Path, work: Path, seed: int, budget: Budget, num_layers: int, precision: str) -> Recipe:
    """Uni-MoE's three stages (arXiv 2405.11273, section 3.4): connectors, one expert per modality, the mixture."""
    return Recipe(
        model=str(start),
        data=[str(corpus_root() / "train.jsonl")],
        out=str(work / "stages"),
        seed=seed,
        stages=[_stage1(budget), _stage2(budget), _stage3(budget)],
        moe=MoeConfig(
            sparse_layers=sparse_layers(num_layers),
            num_experts_per_tok=EXPERTS_PER_TOKEN,
            router_init="modality_means",
            router_init_scale=4.0,
        ),
        precision=precision,  # type: ignore[arg-type]
        cache=str(work / "tower_states"),
    )


def dense_twin_recipe(start: Path, work: Path, seed: int, steps: int, precision: str) -> Recipe:
    """What the sparse model is compared with: the dense one, all of its decoder and its connectors trained at once."""
    stage = StageConfig(
        name="dense_twin",
        train=["ffn", "attention", "connectors"],
        modality_weights=MIX,
        steps=steps,
        learning_rate={"ffn": 1e-3, "attention": 1e-3, "connectors": 5e-4},
        warmup_steps=20,
        label_smoothing=0.02,
        **COMMON,
    )
    data: list[str | DataEntry] = [str(corpus_root() / "train.jsonl")]
    out = str(work / "compare")
    return Recipe(
        model=str(start),
        data=data,
        out=out,
        seed=seed,
        stages=[stage],
        precision=precision,  # type: ignore[arg-type]
        cache=str(work / "tower_states"),
    )


def _stage1(budget: Budget) -> StageConfig:
    return StageConfig(
        name="stage1",
        train=["connectors", "aligners"],
        modalities=["image", "speech", "sound", "video"],
        modality_weights=STAGE1_MIX,
        steps=budget.connectors,
        time_limit_seconds=budget.limit("stage1"),
        learning_rate={"connectors": 2e-3, "aligners": 2e-4},
        warmup_steps=20,
        **COMMON,
    )


def _stage2(budget: Budget) -> StageConfig:
    return StageConfig(
        name="stage2",
        kind="experts",
        train=["ffn", "connectors"],
        experts=[
            ExpertConfig(name, modalities, steps=max(1, round(EXPERT_EFFORT[name] * budget.expert)))
            for name, modalities in EXPERTS.items()
        ],
        modality_weights=MIX,
        time_limit_seconds=budget.limit("stage2"),
        learning_rate={"ffn": 1e-3, "connectors": 1e-3},
        warmup_steps=10,
        **COMMON,
    )


def _stage3(budget: Budget) -> StageConfig:
    return StageConfig(
        name="stage3",
        kind="moe",
        train=["router", "connectors"],
        lora=LoraSettings(rank=16, alpha=32.0, targets=["experts", "attention"]),
        modality_weights=MIX,
        steps=budget.mixed,
        time_limit_seconds=budget.limit("stage3"),
        learning_rate={"router": 1e-3, "connectors": 5e-4, "experts": 2e-3, "attention": 2e-3},
        warmup_steps=20,
        label_smoothing=0.02,
        router_aux_loss_coef=0.002,
        router_z_loss_coef=0.0001,
        **COMMON,
    )
