"""One recipe under several engines, one after the other: `staged_runs.py FOLDER NAME...`, on the ranks of a launcher.

FOLDER holds a dense model and data. NAME is "plain" or "zero-1" to "zero-3"; FOLDER/NAME is what the recipe leaves. Runs
with DeepSpeed are stopped in the middle of their last stage and started again.
"""

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import tiny_training
import torch

from unimoe import UniMoeForCausalLM
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.parallel.ranks import is_first
from unimoe.trainers.parallel.settings import Parallel, deepspeed_settings, start
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_parts import ExpertConfig, LoraSettings, MoeConfig
from unimoe.trainers.saving.resumable import TRAINED_FILE
from unimoe.trainers.stages.stage import LossLog

SAVED_AT, STOPPED_AT = 1, 2
# With what DeepSpeed takes by default, ranks would keep all weights of a model as small as this one; and a gigabyte more.
SMALL = {"stage3_param_persistence_threshold": 700, "reduce_bucket_size": 100_000}


class StoppedError(Exception):
    """A run ended in the middle."""


def write_start(folder: Path) -> None:
    """A dense model that sees, and pictures and texts; to be called before the ranks start."""
    processor = tiny_training.processor()
    config = tiny_training.model(processor, num_hidden_layers=2).config
    config.vision_config.num_hidden_layers = 2
    for part in ("speech_config", "audio_config", "speech_connector", "sound_connector"):
        setattr(config, part, None)
    torch.manual_seed(0)
    UniMoeForCausalLM(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    tiny_training.write_jsonl(folder, per_modality=8)
    tiny_training.write_jsonl(folder / "more", per_modality=12)


def recipe(folder: Path, out: Path, parallel: Parallel) -> Recipe:
    """Two experts, and adapters on the model that they become, beside weights that train as a whole."""
    common: dict[str, Any] = {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0, "log_every": 1}
    experts = [ExpertConfig("media", ["image"]), ExpertConfig("text", ["text"])]
    mixture = StageConfig(
        "mixture",
        "moe",
        ["router", "connectors"],
        lora=LoraSettings(rank=4, alpha=8, targets=["attention", "experts", "ffn"]),
        data=[str(folder / "more" / "train.jsonl")],
        modalities=["image", "text"],
        steps=STOPPED_AT + 1,
        batch_size=2,
        gradient_accumulation_steps=2,
        router_aux_loss_coef=0.5,
        save_every=SAVED_AT,
        **common,
    )
    return Recipe(
        model=str(folder / "model"),
        data=[str(folder / "train.jsonl")],
        out=str(out),
        cache=str(out.with_name(f"{out.name}-cache")),
        moe=MoeConfig(sparse_layers=[1], num_experts_per_tok=1),
        parallel=parallel,
        gradient_checkpointing=True,
        stages=[
            StageConfig("experts", "experts", ["ffn", "connectors"], experts=experts, steps=1, batch_size=4, **common),
            mixture,
        ],
    )


def run(folder: Path, name: str) -> None:
    zero = int(name.partition("-")[2] or 0)
    parallel = Parallel(data=2, zero=zero)
    start(parallel)
    options: dict[str, Any] = {
        "adam_epsilon": 1e-4
    }  # the usual 1e-8 makes whole steps of gradients that are rounding only
    if zero:
        options["deepspeed"] = deepspeed_settings(zero)
        options["deepspeed"]["zero_optimization"] |= SMALL
    models: dict[str, int] = {}

    def count(run: str, *_: Any) -> None:
        if zero and run not in models and run != "experts/text":
            gc.collect()
            models[run] = sum(type(thing) is UniMoeForCausalLM for thing in gc.get_objects())

    watch(folder / name / "mixture", folder / f"{name}-trained.safetensors", stops=zero > 0)
    for _ in range(2 if zero else 1):
        try:
            run_curriculum(
                recipe(folder, folder / name, parallel),
                progress_bar=False,
                on_stage_start=count,
                training_arguments=options,
            )
        except StoppedError:
            watch(folder / name / "mixture", None, stops=False)
    if is_first():
        (folder / f"{name}-models.json").write_text(json.dumps(models), encoding="utf-8")


def watch(stage: Path, kept: Path | None, stops: bool) -> None:
    """Keep what the next run's checkpoint holds beside DeepSpeed's files, and stop it after that."""

    def on_step_end(log: LossLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _on_step_end(log, args, state, control, **kwargs)
        if state.global_step == STOPPED_AT:
            checkpoint = stage / "checkpoints" / f"checkpoint-{SAVED_AT}"
            if kept is not None and is_first():
                shutil.copy(checkpoint / TRAINED_FILE, kept)
            if stops:
                raise StoppedError

    LossLog.on_step_end = on_step_end  # type: ignore[method-assign]


_on_step_end = LossLog.on_step_end

if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for engine in sys.argv[2:]:
        run(Path(sys.argv[1]), engine)
    torch.distributed.destroy_process_group()
