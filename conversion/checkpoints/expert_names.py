"""What experts are called, wherever they are shown: their number, and the name that a model's folder records for them."""

from collections.abc import Sequence
from pathlib import Path

from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from .router_load import recorded_load


def numbered(num_experts: int, known: Sequence[str]) -> list[str]:
    """Numbers, with what the model's folder calls them."""
    names = [str(index) for index in range(num_experts)]
    if len(known) != len(names) or list(known) == names:
        return names
    return [f"{name} {word}" for name, word in zip(names, known, strict=True)]


def expert_names(folder: Path, config: UniMoeTextConfig) -> list[str]:
    """Of a model in a folder; raises ConversionError where its record does not fit the model."""
    load = recorded_load(folder, config.num_experts)
    return numbered(config.num_experts, load.experts if load else [])
