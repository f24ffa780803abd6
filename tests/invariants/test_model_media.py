"""Towers and media: what they give, where it goes, and what is refused."""

from typing import Any

import pytest
import tiny
import torch
import twins
from tiny_towers import clip, image_inputs, mobile_net, siglip, tower_model
from transformers import (
    PreTrainedConfig,
)
from twins import collate, logits

from unimoe import UniMoeForCausalLM
from unimoe.errors import ConfigurationError, ModalityError


@pytest.mark.parametrize(
    ("vision_config", "overrides", "tokens"),
    [
        (clip(), {}, 16),
        (clip(), {"vision_feature_select_strategy": "full"}, 17),
        (clip(), {"vision_token_grid": 2}, 4),
        (siglip(), {"vision_feature_select_strategy": "full"}, 16),
        (siglip(), {"vision_feature_select_strategy": "full", "vision_token_grid": 3}, 9),
        (mobile_net(), {"vision_feature_layer": -1}, 1),
        (mobile_net(), {"vision_feature_layer": 3}, 16),
        (mobile_net(), {"vision_feature_layer": 3, "vision_token_grid": 2}, 4),
    ],
    ids=["clip", "clip+class", "clip 2x2", "siglip", "siglip 3x3", "mobilenet", "mobilenet map", "mobilenet map 2x2"],
)
def test_vision_towers(vision_config: PreTrainedConfig, overrides: dict[str, Any], tokens: int) -> None:
    model = tower_model(vision_config, **overrides)
    inputs = image_inputs(model)
    assert (inputs["input_ids"] == tiny.IMAGE).sum(1).tolist() == [tokens, tokens]
    first, second = logits(model, inputs)
    assert not torch.allclose(first[-1], second[-1])


def test_token_grid_averages_neighbouring_patches() -> None:
    whole, pooled = tower_model(clip()).model, tower_model(clip(), vision_token_grid=2).model
    pooled.load_state_dict(whole.state_dict())
    pixels = image_inputs_pixels()
    patches = whole.encode_image(pixels).unflatten(1, (2, 2, 2, 2))
    expected = patches.mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(pooled.encode_image(pixels), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("config", "strategy", "patches"), [(clip(), "full", 17), (siglip(), "patch", 15)])
def test_patches_that_are_no_square_map_are_refused(config: PreTrainedConfig, strategy: str, patches: int) -> None:
    model = tower_model(config, vision_feature_select_strategy=strategy, vision_token_grid=2)
    with pytest.raises(
        ConfigurationError,
        match=rf"vision_token_grid is 2, .* {patches} patches.* vision_feature_select_strategy \(now",
    ):
        model.model.encode_image(image_inputs_pixels())


def image_inputs_pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_mean_video_features_are_the_mean_of_the_frames_features(full_model: UniMoeForCausalLM) -> None:
    videos = tiny.media(videos=3)["pixel_values_videos"]
    frames = full_model.get_image_features(videos.flatten(0, 1)).pooler_output.unflatten(0, (3, 2))
    pooled = full_model.get_video_features(videos).pooler_output
    torch.testing.assert_close(pooled, frames.mean(1), atol=1e-6, rtol=0)


def test_unpooled_video_keeps_every_frame_in_order(full_model: UniMoeForCausalLM) -> None:
    model = tiny.model(video_pooling="none")
    videos = tiny.media(videos=3)["pixel_values_videos"]
    frames = model.get_image_features(videos.flatten(0, 1)).pooler_output
    assert torch.equal(model.get_video_features(videos).pooler_output, frames.reshape(3, 8, tiny.HIDDEN))
    inputs = {"input_ids": torch.tensor([[5, *[tiny.VIDEO] * 8, 6]]), "pixel_values_videos": videos[:1]}
    assert logits(model, inputs).shape == (1, 10, tiny.VOCAB_SIZE)


def test_videos_take_their_own_connector_when_there_is_one() -> None:
    model = tiny.model(video_connector=tiny.connector())
    videos = tiny.media(videos=1)["pixel_values_videos"]
    frames = model.get_image_features(videos.flatten(0, 1)).pooler_output.unflatten(0, (1, 2))
    assert not torch.allclose(model.get_video_features(videos).pooler_output, frames.mean(1), atol=1e-3)


@pytest.mark.parametrize("name", ["everything", "shared-tower"])
def test_states_of_the_towers_in_place_of_media(name: str) -> None:
    model = twins.build(name)
    inputs = collate(twins.samples(name))
    expected = logits(model, inputs)
    encode = {
        "pixel_values": ("image_encoder_states", model.model.encode_image),
        "pixel_values_videos": ("video_encoder_states", model.model.encode_video),
        "speech_features": ("speech_encoder_states", model.model.encode_speech),
        "audio_features": ("sound_encoder_states", model.model.encode_sound),
    }
    for raw, (states, encoder) in encode.items():
        inputs[states] = encoder(inputs.pop(raw))
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize(
    ("ids", "media", "numbers"),
    [
        (tiny.prompt(5, "image", 6), {"images": 2}, ["4 image", "8 features", "2 items of 4"]),
        (tiny.prompt(5, "image", "image", 6), {"images": 1}, ["8 image", "4 features"]),
        (tiny.prompt(5, "image", 6)[:-2], {"images": 1}, ["3 image", "4 features"]),
        (tiny.prompt(5, "video", 6), {"videos": 2}, ["4 video", "8 features"]),
        ([5, tiny.AUDIO, tiny.SOUND, tiny.SOUND], {"windows": 1}, ["1 speech", "3 features"]),
        ([5, *[tiny.AUDIO] * 3, tiny.SOUND], {"windows": 1}, ["1 sound", "2 features"]),
        ([5, 6], {"images": 1}, ["0 image", "4 features"]),
    ],
)
def test_placeholders_that_do_not_match_the_media(
    full_model: UniMoeForCausalLM, ids: list[int], media: dict[str, int], numbers: list[str]
) -> None:
    with pytest.raises(ModalityError) as error:
        full_model(input_ids=torch.tensor([ids]), **tiny.media(**media))
    for number in numbers:
        assert number in str(error.value)


@pytest.mark.parametrize(
    ("media", "field"),
    [
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, "vision_config"),
        ({"pixel_values_videos": torch.zeros(1, 2, 3, 16, 16)}, "vision_config"),
        ({"speech_features": torch.zeros(1, 80, 100)}, "speech_config"),
        ({"audio_features": torch.zeros(1, 98, 128)}, "audio_config"),
    ],
    ids=["image", "video", "speech", "sound"],
)
def test_media_without_a_tower(media: dict[str, torch.Tensor], field: str) -> None:
    model = twins.build("text-only")
    with pytest.raises(ModalityError, match=field):
        model(input_ids=torch.tensor([[5, 6]]), **media)


def test_ids_and_embeddings_exclude_each_other(full_model: UniMoeForCausalLM) -> None:
    for inputs in ({}, {"input_ids": torch.tensor([[5]]), "inputs_embeds": torch.zeros(1, 1, tiny.HIDDEN)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            full_model(**inputs)
