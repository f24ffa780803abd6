"""What transformers puts around modules by a model's plans: which style a module has, and its forward without one."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def planned_style(plan: Mapping[str, str], name: str) -> str | None:
    """The style that a plan, as `model.tp_plan`, has for a module of this name."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    return plan.get(replace_layer_number_by_wildcard(name))


def forward_of_class(module: nn.Module) -> Callable[..., Any]:
    """A module's forward without what transformers has put around it."""
    return type(module).forward.__get__(module)
