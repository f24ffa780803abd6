"""Every exception that unimoe raises on purpose, in one place.

Those of the Hub-bound files are defined beside the code that raises them, because these files travel alone; the others in
`package_errors`, from where `processing/perception` takes them: this file stands above all of `processing`.
"""

from .modeling_unimoe.errors_unimoe import ConfigurationError, ModalityError, UniMoeError
from .package_errors import (
    CheckpointError,
    ConversionError,
    DataError,
    PartError,
    RecipeError,
    RequestError,
    TrainingError,
)
from .processing.media_policy_unimoe import (
    ConversationError,
    MediaError,
    MissingPackageError,
    OptionError,
    PlaceholderError,
)

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ConversationError",
    "ConversionError",
    "DataError",
    "MediaError",
    "MissingPackageError",
    "ModalityError",
    "OptionError",
    "PartError",
    "PlaceholderError",
    "RecipeError",
    "RequestError",
    "TrainingError",
    "UniMoeError",
]
