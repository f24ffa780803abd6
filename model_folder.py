"""What the MODEL of a command means, by its name and its config.json: nothing heavy is imported here.

Commands ask this first, so that a wrong name is refused at once and not after the seconds in which torch is imported.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from .errors import ConversionError, PartError
from .hub_access import hub_snapshot

MODEL_TYPE = "unimoe"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def resolve_folder(name: str, hub_patterns: tuple[str, ...]) -> Path:
    """The folder itself, or a snapshot of the files that match the patterns of a model on the Hub.

    Raises:
        ConversionError: there is no such folder, and no such model that can be had.
    """
    if os.path.isdir(folder := os.path.expanduser(name)):
        return Path(folder)
    if os.path.exists(folder) or name.startswith(".") or not _HUB_ID.fullmatch(name):
        raise ConversionError(f"{name!r} is no folder. Give a model folder or a Hub id (owner/name).")
    try:
        return hub_snapshot(name, hub_patterns)
    except PartError as error:
        raise ConversionError(f"{name!r} is no folder, and {error}") from error


def require_model(name: str, *, others: bool = False) -> None:
    """Refuse what can be no model, as far as its name and its config.json tell.

    Args:
        name: folder or Hub id; of a model on the Hub config.json is fetched.
        others: any model of transformers will do.

    Raises:
        ConversionError: there is no such folder or Hub repository, or it holds no model, or another kind.
    """
    folder = resolve_folder(name, ("config.json",))
    if not others:
        require_ours(folder)
    elif not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} has no config.json: give a Hugging Face model folder.")


def require_ours(folder: Path) -> None:
    """Refuse a folder whose config.json, if there is one, is of another kind of model. Raises ConversionError."""
    path = folder / "config.json"
    model_type = read_json(path).get("model_type") if path.is_file() else None
    if model_type is None:
        raise ConversionError(f"{folder} has no config.json with a model_type: give a model folder.")
    if model_type != MODEL_TYPE:
        raise ConversionError(
            f"{folder} holds a {model_type!r} model, not one of ours. `unimoe convert upcycle` makes one of it."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConversionError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing: the folder is not complete. Fetch the file.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} cannot be read as JSON ({error}). Fetch the file again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} does not hold a JSON object. Fetch the file again.")
    return content


__all__ = ["MODEL_TYPE", "read_json", "require_model", "require_ours", "resolve_folder"]
