"""Whisper as the speech tower, and its decoder as the start of the query decoder (Uni-MoE, arXiv 2405.11273, 3.2).

A Whisper encoder takes exactly `2 * max_source_positions` mel frames (100 per second), so a two-second word would be
padded to thirty seconds and cost fifteen times the work. The positions are sinusoids counted from the start, so cutting
their table to a shorter window changes nothing for the frames that stay.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperConfig

from ...errors import ConversionError
from ...modeling_unimoe.encoding_unimoe import build_tower
from ..checkpoints.checkpoint_reader import Checkpoint
from ..checkpoints.key_rules import Shape
from ..checkpoints.our_folder import READING_ERRORS
from ..dense.connector_fields import QUERY_DECODER_FIELDS
from ..dense.encoder_folders import nameless, require_type, whisper_features
from ..dense.sources import resolve_model_folder
from ..dense.tokenizer_files import read_tokenizer
from .composed_part import ComposedPart, Made, left_over, taken

TOWER, CONNECTOR = "model.speech_tower.", "model.speech_connector."
POSITIONS_PER_SECOND = 50
_POSITIONS = "embed_positions.weight"
_DECODER_PROMPT = ("<|startoftranscript|>", "<|notimestamps|>")


@dataclass(frozen=True)
class SpeechTower:
    """Whisper's encoder, cut to a window.

    Args:
        features: settings of its spectrogram, see `whisper_features`.
    """

    part: ComposedPart
    config: WhisperConfig
    checkpoint: Checkpoint
    features: dict[str, Any]


def open_speech_tower(name: str, window_seconds: int | None = None) -> SpeechTower:
    """Open a folder or Hub id; only headers are read.

    Args:
        window_seconds: length of a window; None keeps Whisper's.

    Raises:
        ConversionError: it holds no Whisper, or the window is impossible.
    """
    folder = resolve_model_folder(name)
    require_type(folder, "whisper")
    try:
        whole = nameless(WhisperConfig.from_pretrained(folder))
    except READING_ERRORS as error:
        raise ConversionError(f"The configuration in {folder} cannot be read ({error}). Fetch it again.") from error
    features = whisper_features(folder, whole.num_mel_bins)
    config = whole if window_seconds is None else shortened_config(whole, window_seconds)
    features["window_seconds"] = config.max_source_positions / POSITIONS_PER_SECOND
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in build_tower(whole).state_dict().items()}
    tensors = taken(checkpoint, TOWER, expected, "Whisper's encoder")
    tensors[TOWER + _POSITIONS] = _first_positions(
        checkpoint, tensors[TOWER + _POSITIONS], config.max_source_positions
    )
    facts = f"whisper, width {config.d_model}, windows of {features['window_seconds']:g} s"
    part = ComposedPart("speech tower", name, folder, facts, tuple(checkpoint.files), tensors)
    part.dropped = left_over(checkpoint, tensors.values(), "not part of Whisper's encoder")
    return SpeechTower(part, config, checkpoint, features)


def shortened_config(config: WhisperConfig, seconds: int) -> WhisperConfig:
    """A copy for windows of `seconds`: `max_source_positions` is 50 * seconds.

    Raises:
        ConversionError: `seconds` is no whole number from 1 to the model's own window (30).
    """
    available = config.max_source_positions // POSITIONS_PER_SECOND
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 1 <= seconds <= available:
        raise ConversionError(
            f"A Whisper window of {seconds!r} seconds is not possible; choose a whole number 1..{available}."
        )
    config = copy.deepcopy(config)
    config.max_source_positions = seconds * POSITIONS_PER_SECOND
    return config


def query_decoder_fields(tower: SpeechTower) -> dict[str, Any]:
    """`decoder_config` of a query decoder that starts as this Whisper's decoder."""
    return {name: getattr(tower.config, name) for name in QUERY_DECODER_FIELDS}


def add_query_decoder(tower: SpeechTower, expected: dict[str, Shape]) -> None:
    """Let a query decoder start as Whisper's decoder; the word embeddings stay behind.

    Args:
        expected: names below `model.speech_connector.` -> shapes.

    Raises:
        ConversionError: the checkpoint holds no decoder.
    """
    below = {key.removeprefix("decoder."): shape for key, shape in expected.items() if key.startswith("decoder.")}
    # Both halves have layers, norms and positions; what only a decoder has tells them apart.
    below = dict(sorted(below.items(), key=lambda item: "encoder_attn" not in item[0]))
    tower.part.tensors |= taken(tower.checkpoint, CONNECTOR + "decoder.", below, "Whisper's decoder")
    tower.part.dropped = left_over(
        tower.checkpoint, tower.part.tensors.values(), "words, which the query decoder neither reads nor writes"
    )


def add_prompt_queries(tower: SpeechTower, num_tokens: int) -> None:
    """Let the first queries start as the embeddings of Whisper's own prompt (start of transcript, no timestamps).

    So the second query already decodes to the state from which Whisper would read off the first spoken word.

    Raises:
        ConversionError: there is no tokenizer, or no word embeddings.
    """
    tokenizer = read_tokenizer(Path(tower.part.path))
    words = next((name for name in tower.checkpoint.tensors if name.endswith("embed_tokens.weight")), None)
    if tokenizer is None or words is None:
        raise ConversionError(
            f"{tower.part.path} lacks tokenizer or word embeddings, which prompt queries start from."
        )
    ids = [tokenizer.get_vocab()[token] for token in _DECODER_PROMPT[:num_tokens]]
    width = tower.config.d_model

    def queries() -> torch.Tensor:
        rows = [tower.checkpoint.read_flat(words, row * width, width) for row in ids]
        zeros = torch.zeros(num_tokens - len(rows), width)
        return torch.cat([torch.stack(rows).float(), zeros])[None]

    tower.part.tensors[CONNECTOR + "query_tokens"] = Made((1, num_tokens, width), (queries,), (words,))
    tower.part.dropped.pop(words, None)


def _first_positions(checkpoint: Checkpoint, whole: Made, rows: int) -> Made:
    (name,), width = whole.made_of, whole.shape[1]

    def first() -> torch.Tensor:
        return checkpoint.read_flat(name, 0, rows * width).view(rows, width)

    return whole if rows == whole.shape[0] else Made((rows, width), (first,), (name,))


__all__ = [
    "SpeechTower",
    "add_prompt_queries",
    "add_query_decoder",
    "open_speech_tower",
    "query_decoder_fields",
    "shortened_config",
]
