"""What a configuration may ask for at most, and the check that says so.

A configuration comes from strangers: without these caps a file of a few bytes could ask for a terabyte.
"""

from collections.abc import Mapping
from typing import Any

from .errors_unimoe import ConfigurationError

MAX_EXPERTS = 4096
MAX_LAYERS = 1024
MAX_HIDDEN_SIZE = 65_536
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_VOCAB_SIZE = 1 << 24
MAX_HEADS = 4096
MAX_POSITIONS = 1 << 31
MAX_QUERIES = 1 << 16


def require_range(owner: str, field: str, value: float, low: float, high: float) -> None:
    """Raises a ConfigurationError unless low <= value <= high."""
    if not (low <= value <= high):
        raise ConfigurationError(f"{owner}.{field} is {value!r}; it must be between {low} and {high}.")


def require_sizes(owner: str, config: Any, largest: Mapping[str, int]) -> None:
    """Raises a ConfigurationError unless every field named in `largest` lies between 1 and its cap."""
    for field, high in largest.items():
        require_range(owner, field, getattr(config, field), 1, high)
