"""The root of unimoe's exceptions and the ones that a configuration or a model raises.

Every message says what went wrong, which value caused it and what to do about it.
"""


class UniMoeError(ValueError):
    """Root of the family; catching it catches every error that unimoe raises on purpose."""


class ConfigurationError(UniMoeError):
    """A configuration field, or a combination of fields, cannot work."""


class ModalityError(UniMoeError):
    """Media were given to a model that has no tower for them, or their count does not match the placeholders."""
