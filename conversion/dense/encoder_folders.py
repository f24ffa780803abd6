"""The folder of an encoder: what its config.json must say, how it wants its inputs, and a configuration without its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ...errors import ConversionError, UniMoeError
from ..checkpoints.checkpoint_reader import read_json

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
_PREPROCESSOR = "preprocessor_config.json"


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


def whisper_features(folder: Path, num_mel_bins: int = 80) -> dict[str, Any]:
    """Settings of a Whisper's log-mel spectrogram, by the names of `UniMoeFeatureExtractor`.

    Raises:
        ConversionError: the folder has none.
    """
    settings = preprocessor_settings(folder)
    return {
        "feature_size": settings.get("feature_size", num_mel_bins),
        "sampling_rate": settings.get("sampling_rate", 16_000),
        "window_seconds": float(settings.get("chunk_length", 30)),
        "n_fft": settings.get("n_fft", 400),
        "hop_length": settings.get("hop_length", 160),
    }


def preprocessor_settings(folder: Path) -> dict[str, Any]:
    """An encoder's preprocessor_config.json. Raises ConversionError when there is none."""
    if not (folder / _PREPROCESSOR).is_file():
        raise ConversionError(f"{folder / _PREPROCESSOR} is missing: the folder is not complete. Fetch the file.")
    return read_json(folder / _PREPROCESSOR)
