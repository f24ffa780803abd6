"""One training run of a curriculum: from a model in memory to the same model trained, in a folder of its own."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ...errors import RecipeError
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..data.bad_samples import BadSamples
from ..data.batching import batching_of
from ..data.conversations import ConversationDataset
from ..data.data_sets import TrainingData
from ..parallel.parallel_run import RequireEngine, whole_again
from ..parallel.ranks import is_first, of_first, only_first, wait_for_all
from ..parallel.settings import Parallel
from ..planning.speed import seconds_per_checkpoint, seconds_per_step
from ..recipe.recipe import COEFFICIENTS, StageConfig
from ..recipe.telemetry_settings import TelemetrySettings
from ..saving.checkpoints import append_line, newest_checkpoint, write_durably
from ..steps.balance_decay import BalanceDecay
from ..steps.lora import add_lora, merge_lora
from ..steps.loss_meter import LOGGED_LOSSES
from ..steps.trainable import TrainableRow, count_trainable, set_trainable, trainable_table
from ..telemetry.stage_page import LOSSES_FILE, write_stage_page
from ..telemetry.telemetry import watch_stage
from ..trainer import UniMoeTrainer
from .mixer_stage import choose_experts

logger = logging.get_logger(__name__)

PLAN_FILE = "plan.json"
CHECKPOINTS_FOLDER = "checkpoints"
# Newer releases of transformers have renamed it, and warn of the old name.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
_CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# A stage that has a time limit keeps this share of it for saving and for steps that are slower than measured.
_TIME_RESERVE = 0.05


@dataclass
class Progress:
    """Where a run is; `losses` holds the loss and its parts, and `group_losses` the cross entropy by group."""

    stage: str
    step: int
    steps: int
    seconds: float
    losses: dict[str, float]
    group_losses: dict[str, float]


@dataclass
class StageReport:
    """What a stage did. `loss_first` and `loss_last` are cross entropies over its first and last twentieth."""

    name: str
    kind: str
    steps: int
    seconds: float
    trainable_parameters: int
    loss_first: float
    loss_last: float
    model: str | None = None
    evaluation: dict[str, Any] | None = None
    runs: list["StageReport"] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "StageReport":
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**{**known, "runs": [cls.from_dict(run) for run in known.get("runs", [])]})


OnProgress = Callable[[Progress], None]
OnStageStart = Callable[[str, list[TrainableRow], int], None]


@dataclass
class RunSettings:
    """What the runs of a curriculum share.

    make_collator: stage -> collator. on_start: called with the run's name, the table of what trains and its steps.
    """

    processor: Any
    make_collator: Callable[[StageConfig], Any]
    seed: int = 0
    precision: str = "float32"
    max_bad_samples: float = 0.01
    gradient_checkpointing: bool = False
    progress_bar: bool = True
    on_progress: OnProgress | None = None
    on_start: OnStageStart | None = None
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    training_arguments: dict[str, Any] = field(default_factory=dict)
    parallel: Parallel = field(default_factory=Parallel)


def run_training(
    model: UniMoeForCausalLM,
    dataset: TrainingData,
    stage: StageConfig,
    folder: Path,
    settings: RunSettings,
    *,
    name: str | None = None,
    trained_names: Callable[[str], bool] | None = None,
) -> tuple[UniMoeForCausalLM, StageReport]:
    """Train a model as a stage says; goes on from the newest complete checkpoint in the folder, if there is one.

    Args:
        model: trained in place.
        folder: gets losses, the plan and checkpoints.
        trained_names: see `set_trainable`.

    Returns:
        The model without adapters, and the report.
    """
    name = name or stage.name
    folder.mkdir(parents=True, exist_ok=True)
    trained_model = _made_ready(model, stage, settings.seed, trained_names)
    collator = settings.make_collator(stage)
    collator.fit(dataset)
    checkpoints = folder / CHECKPOINTS_FOLDER
    checkpoint = of_first(newest_checkpoint(checkpoints) if is_first() else None)

    def trainer_for(steps: int) -> UniMoeTrainer:
        trainer = _build_trainer(trained_model, dataset, collator, stage, checkpoints, steps, settings)
        trainer.bad_samples = BadSamples(
            folder, _samples_of(dataset, stage, steps * settings.parallel.data), settings.max_bad_samples
        )
        trainer.bad_samples.note((str(sample["id"]), reason) for sample, reason in dataset.left_out)
        return trainer

    planned = of_first(_decide_steps(stage, folder, trainer_for) if is_first() else 0)
    trainer = trainer_for(planned)
    watch_stage(trainer, settings.telemetry, folder)
    if settings.on_start is not None:
        settings.on_start(name, trainable_table(trained_model), planned)
    log = LossLog(name, folder / LOSSES_FILE, planned, trainer, settings)
    log.keep_until(0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
    trainer.add_callback(log)
    if stage.router_aux_loss_final_coef is not None:
        steps_of_decay = stage.router_aux_loss_decay_steps or planned
        trainer.add_callback(BalanceDecay(model.config.text_config, stage.router_aux_loss_final_coef, steps_of_decay))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    first, last = log.ends()
    report = StageReport(name, stage.kind, planned, log.seconds, count_trainable(trained_model), first, last)
    if settings.telemetry.page and trainer.is_world_process_zero():
        write_stage_page(folder, name, model.config.text_config)
    return _at_rest(merge_lora(whole_again(trainer, trained_model))), report


def _made_ready(
    model: UniMoeForCausalLM, stage: StageConfig, seed: int, trained_names: Callable[[str], bool] | None
) -> Any:
    """The model, under its adapters if the stage has some, with what the stage trains switched on."""
    apply_balance_terms(model, stage)
    choose_experts(model, stage.mixer_choice)
    torch.manual_seed(seed)
    set_trainable(model, stage.train, trained_names)
    return model if stage.lora is None else add_lora(model, stage.lora)


def _at_rest(model: UniMoeForCausalLM) -> UniMoeForCausalLM:
    """Without gradients and optimizer state, which must not live as long as the model does."""
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    choose_experts(model, "gates")
    return model.eval()


class LossLog(TrainerCallback):
    """Writes one line per log to a file, shows a progress bar and calls `on_progress`."""

    def __init__(self, name: str, file: Path, steps: int, trainer: UniMoeTrainer, settings: RunSettings) -> None:
        self.name, self.file, self.steps, self.trainer, self.settings = name, file, steps, trainer, settings
        self.records: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._before = 0.0
        self._bar: tqdm | None = None

    def keep_until(self, step: int) -> None:
        """Forget what a killed run logged after the checkpoint that this one starts from."""
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            complete = [line for line in lines if line.endswith("}")]
            self.records = [record for record in map(json.loads, complete) if record["step"] <= step]
        kept = "".join(json.dumps(record) + "\n" for record in self.records)
        wait_for_all()
        only_first(lambda: write_durably(self.file, kept))
        self._before = self.seconds = self.records[-1]["seconds"] if self.records else 0.0

    def ends(self) -> tuple[float, float]:
        """Mean cross entropy over the first and the last twentieth of the records."""
        losses = [record["ce_loss"] for record in self.records]
        count = max(1, len(losses) // 20)
        return sum(losses[:count]) / count, sum(losses[-count:]) / count

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=self.steps, initial=state.global_step, desc=self.name, disable=not self.settings.progress_bar
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(1)
        # The last step is logged even if it is no multiple, so that a run always has an end.
        if state.global_step == self.steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "ce_loss" not in logs:
            return
        self.seconds = self._before + time.perf_counter() - self._started
        losses = {key: logs[key] for key in LOGGED_LOSSES if key in logs}
        groups = {group: sum(values) / len(values) for group, values in self.trainer.losses.groups.items()}
        record = {
            "step": state.global_step,
            "seconds": round(self.seconds, 3),
            **losses,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "groups": groups,
        }
        self.records.append(record)
        if is_first():
            append_line(self.file, json.dumps(record))
        self._bar.set_postfix_str(f"loss {losses['loss']:.3f}", refresh=False)
        if self.settings.on_progress is not None:
            self.settings.on_progress(Progress(self.name, state.global_step, self.steps, self.seconds, losses, groups))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self._before + time.perf_counter() - self._started
        self._bar.close()


def _build_trainer(
    model: Any,
    dataset: TrainingData,
    collator: Any,
    stage: StageConfig,
    folder: Path,
    steps: int,
    settings: RunSettings,
) -> UniMoeTrainer:
    rates = stage.learning_rate if isinstance(stage.learning_rate, dict) else {}
    options = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "learning_rate": max(rates.values()) if rates else stage.learning_rate,
        "lr_scheduler_type": _SCHEDULES[stage.schedule],
        "warmup_steps": min(stage.warmup_steps, steps),
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.adam_betas[0],
        "adam_beta2": stage.adam_betas[1],
        "max_grad_norm": stage.max_grad_norm,
        "optim": "adamw_torch_fused",
        "logging_steps": stage.log_every,
        "logging_first_step": True,
        "save_strategy": "steps" if stage.save_every else "no",
        "save_steps": stage.save_every or 500,
        "save_total_limit": stage.keep_checkpoints,
        "seed": settings.seed,
        "bf16": settings.precision == "bfloat16",
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused on machines without accelerator
        _CHECKPOINTING: settings.gradient_checkpointing,
        **settings.telemetry.training_arguments(stage.name),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **settings.parallel.training_arguments(),
        **settings.training_arguments,
    }
    trainer = UniMoeTrainer(
        model,
        TrainingArguments(**options),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=settings.processor,
        learning_rates=rates,
        label_smoothing=stage.label_smoothing,
        modality_weights=stage.modality_weights,
        min_learning_rate_ratio=stage.min_learning_rate_ratio,
        max_skipped_steps=stage.max_skipped_steps,
        batching=batching_of(stage, dataset, settings.processor),
    )
    trainer.remove_callback(PrinterCallback)
    if settings.parallel.ranks > 1:
        trainer.add_callback(RequireEngine(trainer, settings.parallel))
    return trainer


def _samples_of(dataset: TrainingData, stage: StageConfig, steps: int) -> int:
    """Samples that there are; of streams those that so many steps of one data rank draw at least."""
    if isinstance(dataset, ConversationDataset):
        return len(dataset) + len(dataset.left_out)
    return steps * stage.batch_size * stage.gradient_accumulation_steps + len(dataset.left_out)


def _decide_steps(stage: StageConfig, folder: Path, trainer_for: Callable[[int], UniMoeTrainer]) -> int:
    """The steps of this run: those of an earlier start of it, else the stage's, cut to the time limit."""
    file, wanted = folder / PLAN_FILE, stage.steps
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["steps"]
    plan: dict[str, Any] = {"steps": wanted}
    if stage.time_limit_seconds is not None:
        started = time.perf_counter()
        trainer = trainer_for(wanted)
        per_step = seconds_per_step(trainer)
        if stage.save_every:
            per_step += seconds_per_checkpoint(trainer, folder / "speed") / stage.save_every
        left = stage.time_limit_seconds * (1 - _TIME_RESERVE) - (time.perf_counter() - started)
        plan |= {"steps": max(1, min(wanted, int(left / per_step))), "measured_seconds_per_step": per_step}
        if plan["steps"] < wanted:
            logger.info(f"{stage.name}: {per_step:.3f} s per step, so {plan['steps']} of {wanted} steps fit.")
    write_durably(file, json.dumps(plan, indent=1))
    return plan["steps"]


def apply_balance_terms(model: UniMoeForCausalLM, stage: StageConfig) -> None:
    """Write a stage's coefficients into the model's configuration. Raises RecipeError where they cannot work."""
    config = model.config.text_config
    for name in COEFFICIENTS:
        if getattr(stage, name) is not None:
            setattr(config, name, getattr(stage, name))
    if config.router_modality_loss_coef and not config.modality_experts:
        raise RecipeError(
            f"Stage {stage.name!r} has router_modality_loss_coef = {config.router_modality_loss_coef}, but the model's "
            "modality_experts names no experts: set moe.modality_experts, or leave this loss out."
        )
    if stage.packing and config.router_losses_as_released:
        raise RecipeError(
            f"Stage {stage.name!r} packs texts, but the model's router losses are sums over rows, as released "
            "(router_losses_as_released), which packing would change: leave packing out."
        )
