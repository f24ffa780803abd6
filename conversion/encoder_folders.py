"""The folder of an encoder: what its config.json must say, and a configuration that does not tell where it lay."""

from pathlib import Path
from typing import Any

from ..errors import ConversionError
from .io import read_json


def nameless(config: Any) -> Any:
    """Without where the encoder came from, which is nobody's business in a published folder."""
    config._name_or_path = ""
    return config


def require_type(folder: Path, *allowed: str) -> None:
    """Raises ConversionError unless config.json names one of these model types."""
    path = folder / "config.json"
    found = read_json(path).get("model_type")
    if found not in allowed:
        raise ConversionError(f"{path} describes a {found!r} model; {' or '.join(map(repr, allowed))} is needed.")
