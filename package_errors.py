"""Exceptions that no Hub-bound file raises; `errors` shows them with all others."""

from .modeling_unimoe.errors_unimoe import UniMoeError


class DataError(UniMoeError):
    """A training or evaluation sample is missing, unreadable or inconsistent."""


class RecipeError(UniMoeError):
    """A recipe file holds an unknown field or an impossible value."""


class CheckpointError(UniMoeError):
    """A checkpoint is incomplete, damaged or belongs to another run."""


class TrainingError(UniMoeError):
    """Training cannot go on, e.g. because a loss is not finite."""


class ConversionError(UniMoeError):
    """A source model cannot be converted, or its receipt does not add up."""


class RequestError(UniMoeError):
    """A request to a server asks for something that cannot be answered."""


class PartError(UniMoeError):
    """An encoder or language model could not be had from any source."""
