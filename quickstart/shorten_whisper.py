"""Whisper for windows shorter than 30 s: the same weights with the encoder's position table cut to the window.

`WhisperEncoder` takes exactly `2 * max_source_positions` mel frames (100 per second), so a two-second word would
otherwise be padded to thirty seconds and cost fifteen times the work. The positions are sinusoids counted from the
start, so cutting their table changes nothing for the frames that stay.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PartError

if TYPE_CHECKING:
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor

POSITIONS_PER_SECOND = 50
_ENCODER, _DECODER = "model.encoder.", "model.decoder."
_POSITIONS = "embed_positions.weight"


def shorten_whisper(
    source: "str | Path | Any", seconds: int
) -> tuple["WhisperConfig", dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
    """Configuration and state dicts of a Whisper that hears windows of `seconds`.

    Args:
        source: a folder with a Whisper model (config.json, model.safetensors), or a loaded
            `WhisperForConditionalGeneration`.
        seconds: whole seconds per window, from 1 to the model's own window (30).

    Returns:
        (config, encoder state, decoder state): the config has `max_source_positions = 50 * seconds`; the states fit
        `WhisperEncoder(config)` and `WhisperDecoder(config)`. The tensors are copies.

    Raises PartError when `source` holds no Whisper or `seconds` is out of range.
    """
    import copy

    config, state = _read_whisper(source)
    encoder = {key.removeprefix(_ENCODER): value for key, value in state.items() if key.startswith(_ENCODER)}
    decoder = {key.removeprefix(_DECODER): value for key, value in state.items() if key.startswith(_DECODER)}
    if _POSITIONS not in encoder or _POSITIONS not in decoder:
        raise PartError(f"{source} lacks Whisper's position tables; encoder and decoder are both needed.")
    available = encoder[_POSITIONS].shape[0] // POSITIONS_PER_SECOND
    _check_seconds(seconds, available)
    config = copy.deepcopy(config)
    config.max_source_positions = seconds * POSITIONS_PER_SECOND
    encoder[_POSITIONS] = encoder[_POSITIONS][: config.max_source_positions]
    return (
        config,
        {key: value.detach().clone() for key, value in encoder.items()},
        {key: value.detach().clone() for key, value in decoder.items()},
    )


def short_feature_extractor(folder: str | Path, seconds: int) -> "WhisperFeatureExtractor":
    """The folder's feature extractor for windows of `seconds`: [mels, 100 * seconds] frames per window."""
    from transformers import WhisperFeatureExtractor

    try:
        settings, _ = WhisperFeatureExtractor.get_feature_extractor_dict(str(folder), local_files_only=True)
    except OSError as error:
        raise PartError(f"{folder} has no Whisper preprocessor_config.json ({error}).") from error
    _check_seconds(seconds, int(settings.get("chunk_length", 30)))
    for derived in ("n_samples", "nb_max_frames"):
        settings.pop(derived, None)
    return WhisperFeatureExtractor(**(settings | {"chunk_length": seconds}))


def _check_seconds(seconds: int, available: int) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 1 <= seconds <= available:
        raise PartError(
            f"A Whisper window of {seconds!r} seconds is not possible; choose a whole number 1..{available}."
        )


def _read_whisper(source: "str | Path | Any") -> tuple["WhisperConfig", dict[str, "torch.Tensor"]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    if isinstance(source, WhisperForConditionalGeneration):
        return source.config, source.state_dict()
    folder = Path(source)
    try:
        config = WhisperConfig.from_pretrained(folder, local_files_only=True)
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise PartError(f"{folder} holds no Whisper model (config.json, model.safetensors): {error}.") from error
    if config.model_type != "whisper":
        raise PartError(f"{folder} holds a {config.model_type!r} model; only Whisper is shortened.")
    return config, state
