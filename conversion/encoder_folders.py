"""The folder of an encoder: what its config.json must say, and a configuration that does not tell where it lay."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..errors import ConversionError, UniMoeError
from .io import read_json

# What configuration classes raise on values that make no sense.
_IMPOSSIBLE = (
    StrictDataclassError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
)


def nameless(config: Any) -> Any:
    """Without where the encoder came from, which is nobody's business in a published folder."""
    config._name_or_path = ""
    return config


@contextmanager
def named_config(path: Path) -> Iterator[None]:
    """Turns what configuration classes raise on impossible values into a ConversionError that names the file."""
    try:
        yield
    except UniMoeError:
        raise
    except _IMPOSSIBLE as error:
        reason = " ".join(str(error).split())
        raise ConversionError(
            f"{path} describes no model that can be built ({reason}). Fetch the file again."
        ) from error


def require_type(folder: Path, *allowed: str) -> None:
    """Raises ConversionError unless config.json names one of these model types."""
    path = folder / "config.json"
    found = read_json(path).get("model_type")
    if found not in allowed:
        raise ConversionError(f"{path} describes a {found!r} model; {' or '.join(map(repr, allowed))} is needed.")
