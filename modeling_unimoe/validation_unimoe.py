"""What a configuration may ask for at most, and the check that says so.

A configuration comes from strangers: without these caps a file of a few bytes could ask for a terabyte.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .errors_unimoe import ConfigurationError

logger = logging.get_logger(__name__)

MAX_EXPERTS = 4096
MAX_LAYERS = 1024
MAX_HIDDEN_SIZE = 65_536
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_VOCAB_SIZE = 1 << 24
MAX_HEADS = 4096
MAX_POSITIONS = 1 << 31
MAX_QUERIES = 1 << 16
MAX_VISION_SCALE = 16
MAX_LABELS = 1 << 16
# Placeholders need no row of the embedding table, so their ids may follow the vocabulary; no tokenizer goes further.
MAX_IDS_BEYOND_VOCABULARY = 1 << 16

# Share of equal letters from which a name is taken for a misspelling, and what transformers itself takes beside fields.
_RESEMBLANCE = 0.85
_TRANSFORMERS_FIELDS = {"torch_dtype", "num_labels", "output_attentions", "attn_implementation", "rope_theta"}

# What transformers needs for a type of RoPE beside `rope_theta`.
_ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def require_range(owner: str, field: str, value: float, low: float, high: float) -> None:
    """Raises a ConfigurationError unless low <= value <= high."""
    if not (low <= value <= high):
        raise ConfigurationError(f"{owner}.{field} is {value!r}; it must be between {low} and {high}.")


def require_sizes(owner: str, config: Any, largest: Mapping[str, int]) -> None:
    """Raises a ConfigurationError unless every field named in `largest` lies between 1 and its cap."""
    for field, high in largest.items():
        require_range(owner, field, getattr(config, field), 1, high)


def warn_of_misspellings(config: PreTrainedConfig, names: Iterable[str]) -> None:
    """Warn, once each, of extra fields that almost have the name of a field of this configuration.

    transformers keeps fields that it does not know, and adds some of its own; so a name that resembles none is let by.
    """
    owner, known = type(config).__name__, [field.name for field in fields(type(config))]
    for name in names:
        if name.startswith("_") or name in config.attribute_map or hasattr(PreTrainedConfig, name):
            continue
        close = get_close_matches(name, known, n=1, cutoff=_RESEMBLANCE)
        if close and name not in _TRANSFORMERS_FIELDS:
            logger.warning_once(f"{owner} has no field {name!r}, which changes nothing. Did you mean {close[0]!r}?")


def require_activation(owner: str, field: str, name: str) -> None:
    """Raises a ConfigurationError unless transformers has an activation of this name."""
    from transformers.activations import ACT2FN  # loads torch, which a configuration alone does not need

    if name not in ACT2FN:
        raise ConfigurationError(f"{owner}.{field} is {name!r}; it must be one of {', '.join(sorted(ACT2FN))}.")


def require_rope(owner: str, parameters: Mapping[str, Any]) -> None:
    """Raises a ConfigurationError unless `rope_parameters` has a type, a base and factors that can be computed with."""
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    kind = parameters.get("rope_type")
    if kind not in kinds:
        raise ConfigurationError(f"{owner}.rope_parameters.rope_type is {kind!r}; it must be one of {kinds}.")
    for field in ("rope_theta", *_ROPE_FIELDS.get(kind, ())):
        value = parameters.get(field)
        several = field in ("short_factor", "long_factor")
        if several and not (isinstance(value, list | tuple) and value and all(map(_is_positive, value))):
            raise ConfigurationError(
                f"{owner}.rope_parameters.{field} is {value!r}; {kind!r} needs a list of finite numbers > 0."
            )
        if not several and not _is_positive(value):
            raise ConfigurationError(
                f"{owner}.rope_parameters.{field} is {value!r}; {kind!r} needs a finite number > 0."
            )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
