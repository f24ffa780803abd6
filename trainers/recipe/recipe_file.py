"""Recipes on disk: YAML to `Recipe` and back, with single values overridden on the command line."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from ...errors import RecipeError
from .recipe import Recipe
from .recipe_data import DataEntry
from .recipe_values import build, require


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Relative paths in it are relative to the recipe's folder.

    Args:
        overrides: "field=value" or "stage name.field=value"; values are YAML.

    Raises:
        RecipeError: the file is no YAML mapping, or holds unknown fields or impossible values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The recipe {path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}): save it as "
            "UTF-8, or give a YAML file."
        ) from error
    data = _parse_yaml(f"The recipe {path}", text)
    require(isinstance(data, dict), str(path), type(data).__name__, "a YAML mapping with model, data, out and stages")
    for override in overrides:
        _apply_override(data, override)
    recipe = build(Recipe, data, "")
    for name in ("model", "out", "media_root", "cache", "perception"):
        if getattr(recipe, name) is not None:
            setattr(recipe, name, _beside(path, name, getattr(recipe, name)))
    recipe.data = [_data_beside(path, f"data[{number}]", entry) for number, entry in enumerate(recipe.data)]
    for index, stage in enumerate(recipe.stages):
        if stage.data is not None:
            where = f"stages[{index}].data"
            stage.data = [_data_beside(path, f"{where}[{number}]", entry) for number, entry in enumerate(stage.data)]
    recipe.check()
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe that `load_recipe` reads back equal from anywhere: its paths become absolute."""
    fields = asdict(recipe)
    fields["data"] = [_saved(entry) for entry in recipe.data]
    for stage, saved in zip(recipe.stages, fields["stages"], strict=True):
        saved["data"] = stage.data and [_saved(entry) for entry in stage.data]
    for name in ("model", "out", "cache", "media_root", "perception"):
        fields[name] = fields[name] and str(Path(fields[name]).absolute())
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)
    Path(path).write_text(text, encoding="utf-8")


def _apply_override(data: dict[str, Any], override: str) -> None:
    target, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"The override {override!r} has no '=': write field=value or stage.field=value.")
    *parents, name = target.split(".")
    place: Any = data
    listed = data.get("stages")
    stages = {str(s.get("name")): s for s in (listed if isinstance(listed, list) else []) if isinstance(s, dict)}
    for parent in parents:
        if place is data and parent in stages:
            place = stages[parent]
        else:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict):
            raise RecipeError(f"The override {override!r} goes through {parent!r}, which is no mapping in the recipe.")
    place[name] = _parse_yaml(f"The value of the override {override!r}", text)


def _parse_yaml(what: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date that does not exist; RecursionError: thousands of brackets.
        raise RecipeError(f"{what} is not valid YAML: {error}") from error


def _saved(entry: str | DataEntry) -> str | dict[str, Any]:
    """An entry with absolute paths; of its settings only those that were made."""
    if isinstance(entry, str):
        return str(Path(entry).absolute())
    fields = {name: value for name, value in asdict(entry).items() if value != getattr(DataEntry(), name)}
    return fields | {name: str(Path(fields[name]).absolute()) for name in ("path", "media_root") if name in fields}


def _data_beside(recipe_path: Path, where: str, entry: str | DataEntry) -> str | DataEntry:
    if isinstance(entry, str):
        return _beside(recipe_path, where, entry)
    paths = {name: getattr(entry, name) for name in ("path", "media_root")}
    found = {
        name: _beside(recipe_path, f"{where}.{name}", value) for name, value in paths.items() if value is not None
    }
    return replace(entry, **found)  # type: ignore[arg-type]


def _beside(recipe_path: Path, field_name: str, name: str) -> str:
    require(bool(name) and "\0" not in name, field_name, name, "a path")
    try:
        return str((recipe_path.parent / Path(name).expanduser()).resolve())
    except RuntimeError as error:
        raise RecipeError(f"{field_name} is {name!r}, but there is no such home folder ({error}).") from error
