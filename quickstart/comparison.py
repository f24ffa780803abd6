"""What comparisons of models over several seeds share: where they start, that their settings stay, and results kept on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..trainers.saving.checkpoints import write_durably

RESULT_FILE = "result.json"


def model_after_stage1(start: Path) -> Path:
    """The dense model of a finished quickstart in the folder `start`. Raises RecipeError where there is none."""
    dense = start / "work" / "stages" / "stage1" / "model"
    if not (dense / "config.json").is_file():
        raise RecipeError(f"--start {start} holds no model after stage 1 ({dense}): run the quickstart.")
    return dense


def require_same_comparison(out: Path, now: dict[str, Any]) -> None:
    """Remember the settings of a comparison. Raises RecipeError where `out` holds one of other settings."""
    file = out / "work" / "comparison_settings.json"
    then = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else now
    for name in now:
        if now[name] != then.get(name):
            raise RecipeError(
                f"{out} holds a comparison with {name} = {then.get(name)!r}, now it is {now[name]!r}: go on with that, or "
                "name another --out."
            )
    write_durably(file, json.dumps(now, indent=1))


def kept_result(folder: Path, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `train` returns, kept in `folder`; from there if that run is done."""
    file = folder / RESULT_FILE
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(file, json.dumps(train(), indent=1))
    return json.loads(file.read_text(encoding="utf-8"))
