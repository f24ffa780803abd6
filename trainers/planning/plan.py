"""What a recipe will do and how long it may take, for printing before it starts."""

from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError, RecipeError
from ..data.data_files import files_of
from ..recipe.recipe import Recipe
from ..recipe.recipe_data import entries_of


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan; batch_size counts the samples of a step on one device, all its batches together; seconds is
    the time limit of all its runs, None without one.
    """

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
        samples = stage.batch_size * stage.gradient_accumulation_steps
        rows.append(PlanRow(stage.name, what, steps, samples, seconds))
    return rows


def missing_files(recipe: Recipe) -> list[str]:
    """The model folder and the data files and folders that a recipe names and that are not there."""
    model = Path(recipe.model) / "config.json"
    missing = [] if model.is_file() else [recipe.model]
    return missing + [path for path in data_paths(recipe) if not Path(path).exists()]


def data_paths(recipe: Recipe) -> list[str]:
    """The paths of all data that the stages train on, each once, in order; without those of the Hub."""
    lists = [recipe.data if stage.data is None else stage.data for stage in recipe.stages]
    paths = [entry.path for data in lists for entry in entries_of(data)]
    return [path for path in dict.fromkeys(paths) if path is not None]


def require_model_folder(folder: str) -> None:
    """Raises RecipeError unless a recipe's model is there."""
    if not (Path(folder) / "config.json").is_file():
        raise RecipeError(
            f"The recipe's model {folder} is no model folder: a path counts from the recipe's own folder, and the folder "
            "holds a model of ours with its processor."
        )


def require_data(recipe: Recipe) -> None:
    """Raises DataError unless all data of a recipe are there, in a form that can be read."""
    if missing := [file for file in missing_files(recipe) if file != recipe.model]:
        raise DataError(f"The recipe's data {', '.join(missing)} are not there: paths count from the recipe's folder.")
    for path in data_paths(recipe):
        files_of(Path(path))


def require_cache_where_needed(recipe: Recipe) -> None:
    """Noise and dropout act on cached states; without a cache they would be silently left out."""
    for stage in recipe.stages:
        for name in ("feature_noise", "token_dropout"):
            value = getattr(stage, name)
            if any(value.values()) if isinstance(value, dict) else value:
                raise RecipeError(
                    f"The stage {stage.name!r} has {name} = {value!r}, which acts on cached tower states, but there is "
                    f"no cache: set cache to a folder, or leave {name} out."
                )
