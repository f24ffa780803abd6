"""Whisper for windows shorter than 30 s: the same weights with the encoder's position table cut to the window.

`WhisperEncoder` takes exactly `2 * max_source_positions` mel frames (100 per second), so a two-second word would
otherwise be padded to thirty seconds and cost fifteen times the work. The positions are sinusoids counted from the
start, so cutting their table changes nothing for the frames that stay.
"""

import copy
from typing import TYPE_CHECKING

from ..errors import PartError

if TYPE_CHECKING:
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    State = dict[str, torch.Tensor]

POSITIONS_PER_SECOND = 50
_POSITIONS = "embed_positions.weight"


def shortened_config(config: "WhisperConfig", seconds: int) -> "WhisperConfig":
    """A copy for windows of `seconds`: `max_source_positions` is 50 * seconds.

    Raises:
        PartError: `seconds` is no whole number from 1 to the model's own window (30).
    """
    available = config.max_source_positions // POSITIONS_PER_SECOND
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 1 <= seconds <= available:
        raise PartError(
            f"A Whisper window of {seconds!r} seconds is not possible; choose a whole number 1..{available}."
        )
    config = copy.deepcopy(config)
    config.max_source_positions = seconds * POSITIONS_PER_SECOND
    return config


def shortened_states(model: "WhisperForConditionalGeneration", seconds: int) -> tuple["State", "State"]:
    """Copies of the weights of encoder and decoder, for modules made with `shortened_config(model.config, seconds)`."""
    positions = shortened_config(model.config, seconds).max_source_positions
    encoder, decoder = (
        {name: value.detach().clone() for name, value in part.state_dict().items()}
        for part in (model.model.encoder, model.model.decoder)
    )
    encoder[_POSITIONS] = encoder[_POSITIONS][:positions].clone()
    return encoder, decoder
