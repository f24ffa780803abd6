"""What a recipe says about watching a training: where figures go, and what happens when a router collapses."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from ...errors import RecipeError
from .recipe_values import require_choice

TRACKERS = ("tensorboard", "trackio", "wandb")
ON_COLLAPSE = ("warn", "stop", "ignore")
# Either of these will do for TensorBoard.
_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


@dataclass
class TelemetrySettings:
    """The section `telemetry` of a recipe.

    Args:
        report_to: trackers that get every logged figure, of "tensorboard" (files in the stage's folder), "trackio" and
            "wandb".
        on_collapse: what to do when a router sends everything to the same experts: "warn", "stop" or "ignore".
        page: write `report.html` into the folder of every finished stage.
    """

    report_to: list[str] = field(default_factory=list)
    on_collapse: Literal["warn", "stop", "ignore"] = "warn"
    page: bool = True

    def check(self, where: str) -> None:
        require_choice(f"{where}.on_collapse", self.on_collapse, ON_COLLAPSE)
        for tracker in self.report_to:
            require_choice(f"{where}.report_to", tracker, TRACKERS)
            if not any(find_spec(module) for module in _MODULES[tracker]):
                raise RecipeError(
                    f"{where}.report_to names {tracker!r}, which is not installed: pip install {tracker}, or leave it out."
                )

    def training_arguments(self, name: str) -> dict[str, Any]:
        """For `TrainingArguments` of the run with this name."""
        return {"report_to": list(self.report_to) or "none", "run_name": name}
