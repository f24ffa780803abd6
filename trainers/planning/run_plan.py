"""What a run will train, on how many tokens, in how much memory and time: worked out without weights."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..data.batching import row_rules
from ..recipe.recipe import Recipe, StageConfig
from ..recipe.recipe_data import entries_of
from ..stages.stage import PLAN_FILE
from ..stages.stage_processor import open_processor, processor_of
from ..telemetry.stage_page import LOSSES_FILE
from .memory_plan import Degrees, MemoryPlan, memory_per_rank
from .plan import PlanRow, missing_files, plan_curriculum
from .plan_data import DataSetHeader, GroupEstimate, chosen_count, groups_of, look_at
from .plan_model import StageModel, memory_settings, stage_models


@dataclass(frozen=True)
class Batches:
    """A stage's batches: of its fullest group name, rows, tokens of its longest row and memory; and on average tokens of
    an optimizer step on all ranks, samples of it, and, where the size of the data is known, passes over them.
    """

    group: str
    rows: int
    row_length: int
    memory: MemoryPlan
    tokens_per_step: float
    samples_per_step: float
    passes: float | None


@dataclass(frozen=True)
class StagePlan:
    """One stage. batches is None where no sample could be looked at; seconds of all steps, None when no speed is known."""

    row: PlanRow
    model: StageModel
    groups: list[GroupEstimate]
    batches: Batches | None
    seconds: float | None
    speed: str | None


@dataclass(frozen=True)
class RunPlan:
    """A recipe's plan; `stages` is empty when its model is not there yet, and `missing` names what is not."""

    rows: list[PlanRow]
    missing: list[str]
    headers: dict[str, DataSetHeader | None]
    stages: list[StagePlan]
    degrees: Degrees


def plan_run(
    recipe: Recipe, degrees: Degrees | None = None, tokens_per_second: float | None = None, brief: bool = False
) -> RunPlan:
    """The plan of a recipe: configurations and data are read, weights are not.

    Args:
        degrees: of parallelism; one process when None.
        tokens_per_second: of all ranks together, where no earlier start of a stage has measured its speed.
        brief: say only what the recipe itself does, as if its model were not there.

    Raises:
        RecipeError, ConfigurationError, ConversionError: a stage cannot be, whatever its weights.
        DataError: data cannot be read, or a stage has none.
    """
    degrees = degrees or Degrees()
    rows, missing = plan_curriculum(recipe), missing_files(recipe)
    if brief or recipe.model in missing:
        return RunPlan(rows, missing, {}, [], degrees)
    models = stage_models(recipe, UniMoeConfig.from_pretrained(recipe.model))
    for model in models:
        recipe.parallel.for_model(model.config).require_fits(model.config)
    processor = functools.cache(lambda: open_processor(recipe.model))  # a plan without data needs none
    headers: dict[str, DataSetHeader | None] = {}
    stages = []
    for stage, row, model in zip(recipe.stages, rows, models, strict=True):
        own = _headers(recipe, stage, headers, missing)
        own_processor = processor_of(stage, processor()) if own or stage.chat_template else None
        groups = groups_of(own, stage.modalities, own_processor, row_rules(stage)) if own else []
        whole = None if len(own) < len(_entries(recipe, stage)) else chosen_count(own, stage.modalities)
        batches = (
            _batches(recipe, stage, row, model, groups, whole, degrees) if any(g.longest for g in groups) else None
        )
        seconds, speed = _time(Path(recipe.out), stage, row, batches, tokens_per_second)
        stages.append(StagePlan(row, model, groups, batches, seconds, speed))
    return RunPlan(rows, missing, headers, stages, degrees)


def _entries(recipe: Recipe, stage: StageConfig) -> list[Any]:
    return entries_of(recipe.data if stage.data is None else stage.data)


def _headers(
    recipe: Recipe, stage: StageConfig, known: dict[str, DataSetHeader | None], missing: Sequence[str]
) -> list[DataSetHeader]:
    """The headers of a stage's data sets that can be looked at; each is read once."""
    found = []
    for entry in _entries(recipe, stage):
        if entry.path in missing:
            continue
        key = repr(entry)
        if key not in known:
            known[key] = look_at(entry, recipe.media_root, recipe.voice_as)
        header = known[key]
        if header is not None:
            found.append(header)
    return found


def _batches(
    recipe: Recipe,
    stage: StageConfig,
    row: PlanRow,
    model: StageModel,
    groups: Sequence[GroupEstimate],
    whole: float | None,
    degrees: Degrees,
) -> Batches:
    readable = [group for group in groups if group.longest]
    fullest: tuple[MemoryPlan, GroupEstimate, int] | None = None
    per_row = {}
    for group in readable:
        packed = stage.packing and not group.media and stage.max_length is not None
        length = stage.max_length if packed else group.longest + -group.longest % recipe.pad_to_multiple_of
        per_row[group.names] = max(1, int(stage.max_length / group.tokens)) if packed else 1  # type: ignore[operator]
        media = {kind: stage.batch_size * count for kind, count in group.media.items()}
        logits = length if packed else group.logits_length
        settings = memory_settings(recipe, stage, model, stage.batch_size, length, logits, media)
        memory = memory_per_rank(model.sizes, settings, degrees)
        if fullest is None or memory.total > fullest[0].total:
            fullest = memory, group, length
    assert fullest is not None
    shares = _step_shares(readable, stage.modality_weights, per_row)
    batches = stage.batch_size * stage.gradient_accumulation_steps * degrees.data
    samples = sum(shares[g.names] * per_row[g.names] * batches for g in readable)
    tokens = sum(shares[g.names] * per_row[g.names] * batches * g.tokens for g in readable)
    passes = None if not whole else row.steps * samples / whole
    memory, group, length = fullest
    return Batches(group.names[0], stage.batch_size, length, memory, tokens, samples, passes)


def _step_shares(
    groups: Sequence[GroupEstimate], weights: Mapping[str, float], per_row: Mapping[tuple[str, str, str], int]
) -> dict[tuple[str, str, str], float]:
    """The share of the optimizer steps that every group gets, as the samplers give it."""
    raw = {group.names: group.share / per_row[group.names] for group in groups}
    if weights:
        chosen = {group.names: next((name for name in group.names if name in weights), "") for group in groups}
        sizes: dict[str, float] = {}
        for group in groups:
            sizes[chosen[group.names]] = sizes.get(chosen[group.names], 0.0) + group.share
        raw = {g.names: weights.get(chosen[g.names], 0.0) * g.share / sizes[chosen[g.names]] for g in groups}
    total = sum(raw.values()) or 1.0
    return {names: share / total for names, share in raw.items()}


def _time(
    out: Path, stage: StageConfig, row: PlanRow, batches: Batches | None, tokens_per_second: float | None
) -> tuple[float | None, str | None]:
    """Seconds of a stage, and where its speed is known from."""
    measured = _measured_seconds_per_step(out / stage.name)
    if measured is not None:
        return row.steps * measured, f"{measured:.3g} s a step, measured by an earlier start"
    if tokens_per_second is None or batches is None:
        return None, None
    return row.steps * batches.tokens_per_step / tokens_per_second, f"{tokens_per_second:g} tokens/s, as given"


def _measured_seconds_per_step(folder: Path) -> float | None:
    plan, losses = folder / PLAN_FILE, folder / LOSSES_FILE
    if losses.is_file():
        lines = [line for line in losses.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        last = json.loads(lines[-1]) if lines else {}
        if last.get("seconds") and last.get("step"):
            return float(last["seconds"]) / last["step"]
    if plan.is_file():
        return json.loads(plan.read_text(encoding="utf-8")).get("measured_seconds_per_step")
    return None
