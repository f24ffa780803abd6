"""Uni-MoE's encoders and connectors against golden data: BEATs, Q-Former, Whisper with its query decoder, CLIP, video."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GoldenCase
from planted import require_noticed
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from unimoe_case import AUDIO, IMAGE, VIDEO, encoder_weights, of_row

from unimoe.conversion.checkpoints.llava_keys import VISION_TOWER, vision_prefix
from unimoe.conversion.released.unimoe_keys import ALIGNER, AUDIO_TOWER
from unimoe.modeling_unimoe.configuration_unimoe import UniMoeConnectorConfig
from unimoe.modeling_unimoe.configuration_unimoe_beats import UniMoeBeatsConfig
from unimoe.modeling_unimoe.connectors_unimoe import MlpConnector, build_connector
from unimoe.modeling_unimoe.modeling_unimoe_beats import UniMoeBeatsModel, reduce_padding_mask

attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def has_sound_states(case: GoldenCase) -> bool:
    return case.has("qformer.encoder_out") or case.has("beats.batch_fbank", "beats.batch_padding_mask")


def has_speech_states(case: GoldenCase) -> bool:
    return case.has("whisper.encoder_out") or case.has("whisper.mel")


# What a case must hold to serve a check; what else it holds of the check's tensors is compared too.
REQUIREMENTS = {
    "beats_clips": pytest.mark.golden(
        "beats.fbank[0-9]*", "beats.features[0-9]*", weights=f"{AUDIO_TOWER}patch_embedding.weight"
    ),
    "beats_batch": pytest.mark.golden(
        "beats.batch_fbank", "beats.batch_padding_mask", weights=f"{AUDIO_TOWER}patch_embedding.weight"
    ),
    "qformer": pytest.mark.golden("qformer.*", weights=f"{ALIGNER}qformer.*", where=has_sound_states),
    "whisper": pytest.mark.golden("whisper.mel", weights=f"{AUDIO_TOWER}conv1.weight"),
    "query_decoder": pytest.mark.golden("whisper.*", weights=f"{ALIGNER}decoder.*", where=has_speech_states),
    "image": pytest.mark.golden("batch.images", "clip.*", weights=f"{VISION_TOWER}*"),
    "video": pytest.mark.golden("batch.videos", "batch.video_mask", "video.*", weights=f"{VISION_TOWER}*"),
    "merged": pytest.mark.golden(
        "merged.inputs_embeds",
        *(f"batch.{name}" for name in ("input_ids", "images", "image_mask", "videos", "video_mask")),
        "batch.input_features",
        "batch.features_mask",
        weights=(f"{VISION_TOWER}*", f"{ALIGNER}*", f"{AUDIO_TOWER}*"),
    ),
}


@REQUIREMENTS["beats_clips"]
@attention
def test_beats_encodes_single_clips(golden_case: GoldenCase, attention: str) -> None:
    check_beats_clips(golden_case, attention)


@REQUIREMENTS["beats_batch"]
@attention
def test_beats_encodes_padded_batches_layer_by_layer(golden_case: GoldenCase, attention: str) -> None:
    check_beats_batch(golden_case, attention)


@REQUIREMENTS["qformer"]
@attention
def test_qformer_connects_sound(golden_case: GoldenCase, attention: str) -> None:
    check_qformer(golden_case, attention)


@REQUIREMENTS["whisper"]
@attention
def test_whisper_encodes_speech(golden_case: GoldenCase, attention: str) -> None:
    check_whisper(golden_case, attention)


@REQUIREMENTS["query_decoder"]
@attention
def test_query_decoder_connects_speech(golden_case: GoldenCase, attention: str) -> None:
    check_query_decoder(golden_case, attention)


@REQUIREMENTS["image"]
def test_clip_and_projector_connect_an_image(golden_case: GoldenCase) -> None:
    check_image(golden_case)


@REQUIREMENTS["video"]
def test_video_is_the_mean_over_projected_frames(golden_case: GoldenCase) -> None:
    check_video(golden_case)


@REQUIREMENTS["merged"]
def test_every_medium_of_a_batch_arrives_in_the_embeddings(golden_case: GoldenCase) -> None:
    check_merged(golden_case)


@pytest.mark.parametrize(
    ("check", "tensor"),
    [
        ("beats_clips", "beats.features0"),
        ("beats_batch", "beats.batch_layer0_out"),
        ("beats_batch", "beats.batch_out_padding_mask"),
        ("beats_batch", "beats.batch_frame_mask"),
        ("qformer", "qformer.out"),
        ("qformer", "qformer.audio_tokens"),
        ("whisper", "whisper.encoder_out"),
        ("query_decoder", "whisper.aligner_decoder_out"),
        ("query_decoder", "whisper.speech_tokens"),
        ("image", "clip.patch_features"),
        ("image", "clip.image_tokens"),
        ("video", "video.frame_tokens"),
        ("video", "video.pooled_tokens"),
        ("merged", "merged.inputs_embeds"),
    ],
)
def test_one_changed_golden_value_is_noticed(check: str, tensor: str, tmp_path: Path) -> None:
    require_noticed(globals()[f"check_{check}"], REQUIREMENTS[check], tensor, tmp_path)


@torch.no_grad()
def check_beats_clips(case: GoldenCase, attention: str = "sdpa") -> None:
    model = beats_model(case, attention)
    for name in case.names("beats.fbank[0-9]*"):
        clip = name.removeprefix("beats.fbank")
        case.check_if_present(f"beats.features{clip}", model(case.input(name)).last_hidden_state)


@torch.no_grad()
def check_beats_batch(case: GoldenCase, attention: str = "sdpa") -> None:
    features, padding = case.input("beats.batch_fbank"), case.input("beats.batch_padding_mask")
    output = beats_model(case, attention)(features, padding, output_hidden_states=True)
    case.check_if_present("beats.batch_frame_mask", reduce_padding_mask(padding, features.shape[1]))
    case.check_if_present("beats.batch_out_padding_mask", output.padding_mask)
    case.check_if_present("beats.batch_features", output.last_hidden_state)
    for layer, hidden_states in enumerate(output.hidden_states[1:]):
        case.check_if_present(f"beats.batch_layer{layer}_out", hidden_states)


@torch.no_grad()
def check_qformer(case: GoldenCase, attention: str = "sdpa") -> None:
    # The golden states are those of the first clip of the padded batch.
    if case.has("beats.batch_fbank", "beats.batch_padding_mask"):
        features, padding = case.input("beats.batch_fbank")[:1], case.input("beats.batch_padding_mask")[:1]
        states = beats_model(case, attention)(features, padding).last_hidden_state
        case.check_if_present("qformer.encoder_out", states)
    if case.has("qformer.encoder_out"):
        states = case.input("qformer.encoder_out")
    connector = sound_connector(case, attention)
    before_projection = record_input(connector.projector)
    case.check_if_present("qformer.audio_tokens", connector(states))
    case.check_if_present("qformer.out", before_projection[0])


@torch.no_grad()
def check_whisper(case: GoldenCase, attention: str = "sdpa") -> None:
    case.check_if_present("whisper.encoder_out", speech_states(case, attention))


@torch.no_grad()
def check_query_decoder(case: GoldenCase, attention: str = "sdpa") -> None:
    golden_states = case.has("whisper.encoder_out")
    states = case.input("whisper.encoder_out") if golden_states else speech_states(case, attention)
    connector = speech_connector(case, attention)
    before_projection = record_input(connector.projector)
    case.check_if_present("whisper.speech_tokens", connector(states))
    case.check_if_present("whisper.aligner_decoder_out", before_projection[0])


@torch.no_grad()
def check_image(case: GoldenCase) -> None:
    patches = clip_patches(case, of_row(case.input("batch.images"), 0, "image"))
    case.check_if_present("clip.patch_features", patches)
    if case.has("clip.image_tokens"):
        case.check("clip.image_tokens", image_connector(case)(patches))


@torch.no_grad()
def check_video(case: GoldenCase) -> None:
    row = int(case.input("batch.video_mask").int().argmax())
    frames = image_connector(case)(clip_patches(case, case.input("batch.videos")[row]))
    case.check_if_present("video.frame_tokens", frames)
    case.check_if_present("video.pooled_tokens", frames.mean(dim=0))


@torch.no_grad()
def check_merged(case: GoldenCase) -> None:
    """Places every encoded medium by the rules of the original collator and compares the whole batch.

    Covers the cases that store no encoder output of their own.
    """
    ids, embeddings = case.input("batch.input_ids"), case.weights["model.embed_tokens.weight"]
    has_image, has_video = case.input("batch.image_mask"), case.input("batch.video_mask")
    connect = image_connector(case)
    pictures = case.input("batch.images")
    images = iter(
        connect(clip_patches(case, of_row(pictures, row, "image"))).flatten(0, 1)[None]
        for row in has_image.nonzero().flatten().tolist()
    )
    videos = iter(
        connect(clip_patches(case, video)).mean(dim=0, keepdim=True) for video in case.input("batch.videos")[has_video]
    )
    rows = []
    for row, row_ids in enumerate(ids):
        sources = {IMAGE: images, VIDEO: videos, AUDIO: iter(connected_audio(case, row))}
        blocks = [next(sources[i])[0] if i in sources else embeddings[i][None] for i in row_ids.tolist()]
        rows.append(torch.cat(blocks))
    case.check("merged.inputs_embeds", nn.utils.rnn.pad_sequence(rows, batch_first=True))


def connected_audio(case: GoldenCase, row: int) -> list[torch.Tensor]:
    """One [1, tokens, hidden] block per audio clip of a row; the segments of a clip are joined."""
    slots = case.input("batch.features_mask")[row]
    features = case.input("batch.input_features")[row]
    blocks = []
    for clip in range(1, int(slots.max()) + 1):
        segments = features[slots == clip]
        if case.has("batch.padding_masks"):
            padding = case.input("batch.padding_masks")[row][slots == clip]
            states = beats_model(case)(segments.flatten(0, 1), padding.flatten(0, 1)).last_hidden_state
            tokens = sound_connector(case)(states)
        else:
            tokens = speech_connector(case)(whisper_encoder(case)(segments).last_hidden_state)
        blocks.append(tokens.flatten(0, 1)[None])
    return blocks


def beats_model(case: GoldenCase, attention: str = "sdpa") -> UniMoeBeatsModel:
    config = UniMoeBeatsConfig.from_original(case.config["_beats_cfg"])
    model = UniMoeBeatsModel._from_config(config, attn_implementation=attention)
    return loaded(model, encoder_weights(case, "model.audio_tower."))


def speech_states(case: GoldenCase, attention: str) -> torch.Tensor:
    mel = case.input("whisper.mel")
    return whisper_encoder(case, attention)(mel[None] if mel.ndim == 2 else mel).last_hidden_state


def whisper_encoder(case: GoldenCase, attention: str = "sdpa") -> WhisperEncoder:
    encoder = WhisperEncoder._from_config(
        WhisperConfig(**case.config["_whisper_config"]), attn_implementation=attention
    )
    return loaded(encoder, encoder_weights(case, "model.speech_tower."))


def clip_patches(case: GoldenCase, pixels: torch.Tensor) -> torch.Tensor:
    tower = CLIPVisionModel(CLIPVisionConfig(**case.config["_clip_vision_config"]))
    nested = vision_prefix(f"model.vision_tower.{name}" for name in tower.state_dict()).removeprefix(
        "model.vision_tower."
    )
    weights = encoder_weights(case, "model.vision_tower.")
    loaded(tower, {nested + name: value for name, value in weights.items()})
    hidden_states = tower(pixels, output_hidden_states=True).hidden_states[case.config["mm_vision_select_layer"]]
    return hidden_states[:, 1:] if case.config.get("mm_vision_select_feature", "patch") == "patch" else hidden_states


def image_connector(case: GoldenCase) -> MlpConnector:
    weights = encoder_weights(case, "model.image_connector.")
    config = connector_config(case, weights["layers.0.weight"].shape[1], type="mlp", depth=len(weights) // 2)
    return loaded(build_connector(config), weights)


def sound_connector(case: GoldenCase, attention: str = "sdpa") -> nn.Module:
    weights = encoder_weights(case, "model.sound_connector.")
    config = connector_config(
        case,
        case.config["mm_audio_hidden_size"],
        attention,
        type="qformer",
        num_tokens=weights["query_tokens"].shape[1],
        qformer_config=case.config["_qformer_config"],
    )
    return loaded(build_connector(config), weights)


def speech_connector(case: GoldenCase, attention: str = "sdpa") -> nn.Module:
    weights = encoder_weights(case, "model.speech_connector.")
    config = connector_config(
        case,
        case.config["mm_audio_hidden_size"],
        attention,
        type="query_decoder",
        num_tokens=weights["query_tokens"].shape[1],
        decoder_config=case.config["_whisper_config"],
    )
    return loaded(build_connector(config), weights)


def connector_config(
    case: GoldenCase, input_size: int, attention: str = "sdpa", **fields: Any
) -> UniMoeConnectorConfig:
    config = UniMoeConnectorConfig(input_size=input_size, output_size=case.config["hidden_size"], **fields)
    config._attn_implementation = attention
    return config


def loaded(module: nn.Module, weights: dict[str, torch.Tensor]) -> Any:
    module.load_state_dict(weights)
    return module.eval()


def record_input(module: nn.Module) -> list[torch.Tensor]:
    """A list that receives the first argument of every call of `module`."""
    received: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    return received
