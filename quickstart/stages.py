"""The quickstart's recipe: language, then Uni-MoE's three stages, with budgets for two CPU cores."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..starter_corpus.corpus import corpus_root
from ..trainers.recipe import ExpertConfig, LoraSettings, MoeConfig, Recipe, StageConfig

# Expert e of every sparse layer starts as the FFN that learned these modalities.
EXPERTS = {"image": ["image"], "speech": ["speech"], "sound": ["sound"], "video_text": ["video", "text"]}
# Steps of an expert's run in units of the budget's: motion is what the dense decoder cannot see without it.
EXPERT_EFFORT = {"image": 1.0, "speech": 0.5, "sound": 0.5, "video_text": 5.0}
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


@dataclass(frozen=True)
class Budget:
    """Steps of each stage, and the seconds after which a slow machine cuts a stage short (None: never)."""

    language: int = 400
    connectors: int = 900
    expert: int = 80
    mixed: int = 800
    seconds: dict[str, float] | None = None

    def scaled(self, factor: float, seconds: dict[str, float] | None = None) -> "Budget":
        def scale(steps: int) -> int:
            return max(1, round(steps * factor))

        return Budget(
            scale(self.language),
            scale(self.connectors),
            scale(self.expert),
            scale(self.mixed),
            seconds or self.seconds,
        )

    def limit(self, stage: str) -> float | None:
        return None if self.seconds is None else self.seconds[stage]


def sparse_layers(num_layers: int) -> list[int]:
    """Every second layer is sparse."""
    return list(range(1, num_layers, 2))


def faster_precision() -> str:
    """ "bfloat16" where its matrix products are clearly faster than float32's, else "float32"."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.randn(512, 512, dtype=dtype)
        for _ in range(3):
            matrix @ matrix
        started = time.perf_counter()
        for _ in range(10):
            matrix @ matrix
        return time.perf_counter() - started

    return "bfloat16" if seconds(torch.bfloat16) < 0.6 * seconds(torch.float32) else "float32"


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
        cache_variants={"image": IMAGE_VARIANTS},
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
    data = [str(corpus_root() / "train.jsonl")]
    out = str(work / "compare")
    return Recipe(
        model=str(start),
        data=data,
        out=out,
        seed=seed,
        stages=[stage],
        precision=precision,  # type: ignore[arg-type]
        cache=str(work / "tower_states"),
        cache_variants={"image": IMAGE_VARIANTS},
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


REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up"}
MIRRORED = {"left": "right", "right": "left", "up": "up", "down": "down"}
TRANSPOSED = {"left": "up", "up": "left", "right": "down", "down": "right"}


def vary_videos(
    sample: dict[str, Any], states: dict[str, list[torch.Tensor]], rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, list[torch.Tensor]]]:
    """Play training videos backwards, mirror and transpose them, each half of the time; directions turn along.

    420 clips are few enough to be learned by heart. Mirroring the map of tower states is not quite the same as
    mirroring the frames, and close enough.
    """
    if "video" not in states:
        return sample, states
    direction = sample["messages"][-1]["content"][0]["text"]
    backwards, mirrored, transposed = rng.random(3) < 0.5
    videos = []
    for frames_FPC in states["video"]:
        side = round(frames_FPC.shape[1] ** 0.5)
        frames_FYXC = frames_FPC.unflatten(1, (side, side))
        if backwards:
            frames_FYXC = frames_FYXC.flip(0)
        if mirrored:
            frames_FYXC = frames_FYXC.flip(2)
        if transposed:
            frames_FYXC = frames_FYXC.transpose(1, 2)
        videos.append(frames_FYXC.flatten(1, 2))
    if sample["task"] == "video_direction":
        for happened, turn in ((backwards, REVERSED), (mirrored, MIRRORED), (transposed, TRANSPOSED)):
            direction = turn[direction] if happened else direction
        turned = {"role": "assistant", "content": [{"type": "text", "text": direction}]}
        sample = {**sample, "messages": [*sample["messages"][:-1], turned]}
    return sample, {**states, "video": videos}
