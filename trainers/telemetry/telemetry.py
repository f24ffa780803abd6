"""Watches a training: expert load, router drift, speed and memory at every log, and an alarm when a router collapses.

Figures go into the Trainer's logs, and so to whatever `report_to` names. With a folder, every log also leaves a line in
`telemetry.jsonl` there, from which `stage_page` draws.

What is counted stays on the device until a log, except for a few small tensors that the alarm reads every third step.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ...errors import TrainingError
from ...modeling_unimoe.configuration_unimoe_text import MODALITIES
from ..recipe.telemetry_settings import TelemetrySettings
from ..saving.checkpoints import write_durably
from .collapse import WINDOW, CollapseWatch, alarm_text
from .routing_figures import ExpertLoad, mean_of_known
from .routing_statistics import RoutingCounts, RoutingRecorder

logger = logging.get_logger(__name__)

TELEMETRY_FILE = "telemetry.jsonl"


class Telemetry(TrainerCallback):
    """Of one `UniMoeTrainer`, which adds it by itself.

    Attributes:
        settings: a `TelemetrySettings`; may be set until training begins.
        folder: where `telemetry.jsonl` goes; None writes none.
    """

    def __init__(self, trainer: Any, settings: TelemetrySettings | None = None) -> None:
        self.trainer = trainer
        self.settings = settings or TelemetrySettings()
        self.folder: Path | None = None
        self.recorder = RoutingRecorder(trainer.base, in_training_only=True)
        # The stage's own start: a resumed run loads the checkpoint later.
        self._start = [_whole(router.weight).clone() for router in self.recorder.routers]
        self._watch = CollapseWatch(trainer.base.config.text_config)
        self._alarms: list[dict[str, Any]] = []
        self._logged: RoutingCounts | None = None
        self._looked: RoutingCounts | None = None
        self._since = time.perf_counter()

    # ---- the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self.folder is not None and state.is_world_process_zero:
            _keep_until(self.folder / TELEMETRY_FILE, state.global_step)
        self.recorder.attach()
        self._since = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.detach()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % WINDOW or self.settings.on_collapse == "ignore" or not self.recorder.routers:
            return
        counts = self._read(CollapseWatch.NEEDS)
        window, self._looked = counts.since(self._looked), counts
        if collapses := self._watch.look(window):
            self._alarms += [{"step": state.global_step, "what": str(collapse)} for collapse in collapses]
            message = alarm_text(collapses, state.global_step)
            if self.settings.on_collapse == "stop":
                raise TrainingError(message)
            if state.is_world_process_zero:
                logger.warning(message)

    # ---- figures

    def figures(self) -> dict[str, float]:
        """What has happened since the last call, for the Trainer's log; every rank must call it."""
        read = self._read(("tokens_NM", "chosen_NLMX"))
        counts, self._logged = read.since(self._logged), read
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        tokens_M = counts.tokens_NM.sum(dim=0)
        figures = {"tokens_per_second": float(tokens_M.sum()) / seconds, "memory_gb": peak_memory_bytes() / 2**30}
        record: dict[str, Any] = {
            "step": self.trainer.state.global_step,
            "seconds": round(seconds, 3),
            "tokens": dict(zip(MODALITIES, tokens_M.tolist(), strict=True)),
            **figures,
            "learning_rates": self._learning_rates(),
            "skipped_samples": len(self.trainer.bad_samples.reasons) if self.trainer.bad_samples else 0,
            "skipped_steps": self.trainer.finite_guard.skipped,
        }
        if self.recorder.routers:
            routing, details = self._routing(counts)
            figures |= routing
            record |= details
        self._write(record)
        return figures

    def _routing(self, counts: RoutingCounts) -> tuple[dict[str, float], dict[str, Any]]:
        config = self.trainer.base.config.text_config
        load = ExpertLoad.of(config, counts.tokens_NM.sum(dim=0), counts.chosen_NLMX.sum(dim=0))
        drift, alarms = self._drift(), self._alarms
        self._alarms = []
        details = {
            "layers": load.layers,
            "chosen": counts.chosen_NLMX.sum(dim=0).tolist(),
            "entropy": load.layer_entropies,
            "max_load_ratio": load.max_ratios,
            "dead_experts": load.dead,
            "router_drift": drift,
            "alarms": alarms,
        }
        choices, nulls = load.chosen_LMX[..., :-1].sum(), load.chosen_LMX[..., -1].sum()
        tokens = float(load.tokens_M.sum()) * len(load.layers)
        values = {
            "expert_load_entropy": mean_of_known(load.layer_entropies),
            "dead_experts": float(sum(map(len, load.dead))),
            "max_load_ratio": max((ratio for ratio in load.max_ratios if ratio is not None), default=None),
            "router_drift": mean_of_known(drift),
            "experts_per_token": float(choices) / tokens if tokens else None,
            "null_expert_share": float(nulls / (choices + nulls)) if config.num_null_experts and tokens else None,
        }
        if self.settings.report_to:  # a curve per layer and modality is for trackers, not for a line of text
            by_layer = {
                "expert_load_entropy": load.layer_entropies,
                "max_load_ratio": load.max_ratios,
                "router_drift": drift,
            }
            for name, per_layer in by_layer.items():
                values |= {f"{name}/layer_{layer}": v for layer, v in zip(load.layers, per_layer, strict=True)}
            dead = zip(load.layers, load.dead, strict=True)
            values |= {f"dead_experts/layer_{layer}": float(len(experts)) for layer, experts in dead}
            for index in load.modalities:
                entropies = [row[index] for row in load.entropies]
                values[f"expert_load_entropy/{MODALITIES[index]}"] = mean_of_known(entropies)
        return {name: value for name, value in values.items() if value is not None}, details

    def _drift(self) -> list[float | None]:
        """How far every router has moved since the start: |now - then| over the larger of both norms, 0 to 2."""
        drifts = []
        for router, start in zip(self.recorder.routers, self._start, strict=True):
            now = _whole(router.weight)
            start = start.to(now.device)
            size = torch.maximum(now.norm(), start.norm()).clamp(min=torch.finfo(torch.float32).tiny)
            drifts.append((now - start).norm() / size if now.shape == start.shape and now.numel() else None)
        known = [drift for drift in drifts if drift is not None]
        values = iter(torch.stack(known).tolist() if known else [])
        return [None if drift is None else next(values) for drift in drifts]

    def _learning_rates(self) -> dict[str, float]:
        groups = self.trainer.optimizer.param_groups if self.trainer.optimizer is not None else []
        return {group["role"]: float(group["lr"]) for group in groups if "role" in group}

    def _read(self, names: tuple[str, ...]) -> RoutingCounts:
        return self.recorder.counts.read(self.trainer.accelerator.num_processes > 1, names)

    def _write(self, record: dict[str, Any]) -> None:
        if self.folder is not None and self.trainer.is_world_process_zero():
            with (self.folder / TELEMETRY_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def watch_stage(trainer: Any, settings: TelemetrySettings, folder: Path) -> None:
    """Let a trainer's telemetry write into a stage's folder, and TensorBoard's files lie where they outlive checkpoints."""
    trainer.telemetry.settings, trainer.telemetry.folder = settings, folder
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")


def peak_memory_bytes() -> int:
    """The most memory so far: of the accelerator where there is one, of this process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_telemetry(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's `telemetry.jsonl`; none without the file. A killed process may leave half a line."""
    file = folder / TELEMETRY_FILE
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _keep_until(file: Path, step: int) -> None:
    """Forget what a killed run wrote after the checkpoint that this one starts from."""
    records = [record for record in read_telemetry(file.parent) if record["step"] <= step]
    write_durably(file, "".join(json.dumps(record) + "\n" for record in records))


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A router's weight in float32, also where ranks hold parts of it."""
    weight = weight.detach()
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).float()
