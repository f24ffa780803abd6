"""What a recipe will do and how long it may take, for printing before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass

from .recipe import Recipe


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan; seconds is None where the speed is unknown and there is no time limit."""

    name: str
    what: str
    steps: int
    batch_size: int
    seconds: float | None


def plan_curriculum(recipe: Recipe, seconds_per_step: Mapping[str, float] | None = None) -> list[PlanRow]:
    """What a recipe will do, before it does it.

    Args:
        seconds_per_step: stage name -> measured or assumed seconds of one step.
    """
    rows = []
    for stage in recipe.stages:
        steps = sum(map(stage.steps_of, stage.experts)) if stage.kind == "experts" else stage.steps
        speed = (seconds_per_step or {}).get(stage.name)
        seconds = None if speed is None else steps * speed
        if stage.time_limit_seconds is not None:
            limit = stage.time_limit_seconds * max(1, len(stage.experts))
            seconds = limit if seconds is None else min(seconds, limit)
        what = f"trains {', '.join(stage.train)}" if stage.train else "trains"
        if stage.lora is not None:
            what += f"{' and' if stage.train else ''} LoRA (rank {stage.lora.rank}) on {', '.join(stage.lora.targets)}"
        if stage.kind == "experts":
            what = f"one expert each for {', '.join(expert.name for expert in stage.experts)}: {what}"
        elif stage.kind == "moe":
            what = f"assembles the experts, then {what}"
        rows.append(PlanRow(stage.name, what, steps, stage.batch_size, seconds))
    return rows
