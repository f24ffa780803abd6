"""What `UniMoeModel.forward` takes beside a text. All media are flat over the batch, in the order of their placeholders."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.utils import TransformersKwargs


class UniMoeInputs(TransformersKwargs, total=False):
    """Every medium is given raw or as the states of its tower, which `encode_image` and its siblings return.

    pixel_values [n, 3, H, W]            image_encoder_states [n, P, C]
    pixel_values_videos [n, F, 3, H, W]  video_encoder_states [n, F, P, C]
    speech_features [n, mels, frames]    speech_encoder_states [n, T, C]
    audio_features [n, frames, mels]     sound_encoder_states [n, T, C]
    audio_padding_mask [n, samples], bool: true on padding of audio_features; BEATs alone takes it

    The aux and their masks: see `auxiliary_unimoe`.
    """

    pixel_values: torch.Tensor | None
    pixel_values_videos: torch.Tensor | None
    speech_features: torch.Tensor | None
    audio_features: torch.Tensor | None
    audio_padding_mask: torch.Tensor | None
    image_encoder_states: torch.Tensor | None
    video_encoder_states: torch.Tensor | None
    speech_encoder_states: torch.Tensor | None
    sound_encoder_states: torch.Tensor | None
    aux_input_ids: torch.Tensor | None
    aux_attention_mask: torch.Tensor | None
    aux_pixel_values: torch.Tensor | None
    aux_encoder_states: torch.Tensor | None
    aux_features: torch.Tensor | None
    prompt_mask: torch.Tensor | None
    expert_choice: torch.Tensor | None


def taken(kwargs: Any, names: Iterable[str]) -> dict[str, torch.Tensor | None]:
    """The inputs of these names, taken out of kwargs; None for those that were not given."""
    return {name: kwargs.pop(name, None) for name in names}
