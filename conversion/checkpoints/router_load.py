"""What a model's folder records of how its routers share out tokens."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe_text import MODALITIES
from .checkpoint_reader import read_json

ROUTER_LOAD_FILE = "router_load.json"


@dataclass(frozen=True)
class RouterLoad:
    """Share of each modality's tokens that every expert received: modality -> [sparse layers][experts]."""

    layers: list[int]
    experts: list[str]
    modalities: dict[str, list[list[float]]]


def recorded_load(folder: Path, num_experts: int) -> RouterLoad | None:
    """The load that a model's folder records, if any.

    Raises:
        ConversionError: the record does not fit the model: its numbers would be read as this model's.
    """
    path = folder / ROUTER_LOAD_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    layers, modalities = record.get("layers"), record.get("modalities")
    experts = record.get("experts", [str(i) for i in range(num_experts)])
    fits = isinstance(modalities, dict) and isinstance(layers, list) and len(experts) == num_experts
    if not fits or not all(_is_table(table, len(layers), len(experts)) for table in modalities.values()):
        raise ConversionError(
            f"{path} is no table of {num_experts} experts per layer and modality. Remove it, or "
            'write {"layers": [...], "modalities": {name: [[share per expert] per layer]}}.'
        )
    known = [name for name in MODALITIES if name in modalities]
    ordered = {name: modalities[name] for name in [*known, *(set(modalities) - set(known))]}
    return RouterLoad([int(layer) for layer in layers], [str(expert) for expert in experts], ordered)


def _is_table(table: Any, rows: int, columns: int) -> bool:
    return (
        isinstance(table, list)
        and len(table) == rows
        and all(isinstance(row, list) and len(row) == columns for row in table)
        and all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for row in table for x in row)
    )
