"""What a recipe will do and how long it may take, for printing before it starts."""

from dataclasses import dataclass

from .recipe import Recipe


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan; seconds is the time limit of all its runs, None without one."""

    name: str
    what: str
    steps: int
    batch_size: int
    seconds: float | None


def plan_curriculum(recipe: Recipe) -> list[PlanRow]:
    """What a recipe will do, before it does it."""
    rows = []
    for stage in recipe.stages:
        steps = sum(map(stage.steps_of, stage.experts)) if stage.kind == "experts" else stage.steps
        limit = stage.time_limit_seconds
        seconds = None if limit is None else limit * max(1, len(stage.experts))
        what = f"trains {', '.join(stage.train)}" if stage.train else "trains"
        if stage.lora is not None:
            what += f"{' and' if stage.train else ''} LoRA (rank {stage.lora.rank}) on {', '.join(stage.lora.targets)}"
        if stage.kind == "experts":
            what = f"one expert each for {', '.join(expert.name for expert in stage.experts)}: {what}"
        elif stage.kind == "moe":
            what = f"assembles the experts, then {what}"
        rows.append(PlanRow(stage.name, what, steps, stage.batch_size, seconds))
    return rows
