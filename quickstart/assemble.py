"""Puts parts together: a language model, towers and fresh connectors become one dense `UniMoeForCausalLM`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..modeling_unimoe.connectors_unimoe import QueryDecoderConnector
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.chat_unimoe import AUDIO_TOKEN, IMAGE_TOKEN, SOUND_TOKEN, VIDEO_TOKEN
from ..processing.feature_extraction_unimoe import UniMoeFeatureExtractor
from ..processing.processing_unimoe import UniMoeProcessor
from ..processing.video_processing_unimoe import UniMoeVideoProcessor
from .language import Decoder
from .shorten_whisper import shortened_config, shortened_states

WHISPER_PROMPT = ["<|startoftranscript|>", "<|notimestamps|>"]


@dataclass(frozen=True)
class Shape:
    """How many embeddings the media become.

    Args:
        image_size: pixels that pictures and frames are resized to; the towers take any size.
        grid: an image is grid x grid embeddings, and so is every frame of a video.
        frames: frames sampled from each video.
        window_seconds: length of one audio window; longer clips become several windows.
        speech_tokens, sound_tokens: embeddings per audio window of the two branches.
    """

    image_size: int | None = 128
    grid: int = 2
    frames: int = 8
    window_seconds: int = 3
    speech_tokens: int = 8
    sound_tokens: int = 8


def assemble_dense(
    decoder: Decoder, vision_folder: Path, speech_folder: Path, shape: Shape
) -> tuple[UniMoeForCausalLM, UniMoeProcessor]:
    """A dense model of a decoder, pretrained towers and fresh connectors, and its processor.

    Images and video frames go through the vision tower; audio goes through the Whisper encoder, whose states feed two
    connectors: a query decoder that starts as Whisper's own decoder (speech) and a small pooled MLP (sound).
    """
    whisper = WhisperForConditionalGeneration.from_pretrained(speech_folder, dtype=torch.float32)
    vision = AutoModel.from_pretrained(vision_folder, dtype=torch.float32)
    text_config = decoder.model.config.text_config
    config = _model_config(text_config, decoder.tokenizer, vision, whisper, shape)
    model = UniMoeForCausalLM(config)
    model.model.language_model.load_state_dict(decoder.model.model.language_model.state_dict())
    model.lm_head.load_state_dict(decoder.model.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    _load_whisper(model, whisper, shape)
    model.generation_config.suppress_tokens = [i for i in config.placeholder_ids.values() if i is not None]
    model.generation_config.eos_token_id = decoder.tokenizer.eos_token_id
    model.generation_config.pad_token_id = text_config.pad_token_id
    return model.eval(), _make_processor(decoder, vision_folder, speech_folder, shape)


def connector_start_scale(model: UniMoeForCausalLM) -> float:
    """Make connected features start at the scale of word embeddings; returns that scale (root mean square)."""
    rms = model.model.language_model.embed_tokens.weight.detach().float().square().mean().sqrt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_connector.output_norm.weight"):
                parameter.fill_(rms)
    return float(rms)


def _model_config(
    text_config: UniMoeTextConfig,
    tokenizer: PreTrainedTokenizerBase,
    vision: torch.nn.Module,
    whisper: WhisperForConditionalGeneration,
    shape: Shape,
) -> UniMoeConfig:
    hidden = text_config.hidden_size
    speech_config = shortened_config(whisper.config, shape.window_seconds).to_dict()
    vision_layer, vision_size = _vision_layer(vision)

    def connector(**fields: Any) -> dict[str, Any]:
        return {"output_size": hidden, "output_norm": True, **fields}

    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]

    return UniMoeConfig(
        text_config=text_config,
        vision_config=vision.config,
        speech_config=AutoConfig.for_model(**speech_config),
        image_connector=connector(type="mlp", input_size=vision_size),
        video_connector=connector(type="mlp", input_size=vision_size),
        speech_connector=connector(
            type="query_decoder",
            input_size=whisper.config.d_model,
            num_tokens=shape.speech_tokens,
            decoder_config=speech_config,
        ),
        sound_connector=connector(type="mlp", input_size=whisper.config.d_model, num_tokens=shape.sound_tokens),
        image_token_id=token_id(IMAGE_TOKEN),
        video_token_id=token_id(VIDEO_TOKEN),
        audio_token_id=token_id(AUDIO_TOKEN),
        sound_token_id=token_id(SOUND_TOKEN),
        vision_feature_layer=vision_layer,
        vision_token_grid=shape.grid,
        video_pooling="none",
        video_num_frames=shape.frames,
    )


@torch.no_grad()
def _vision_layer(vision: torch.nn.Module) -> tuple[int, int]:
    """Hidden state to read and its width: a transformer's last but one (LLaVA's choice), a convolutional net's last."""
    size = getattr(vision.config, "image_size", None) or 160
    states = vision(torch.zeros(1, 3, size, size), output_hidden_states=True).hidden_states
    layer = -1 if states[-1].dim() == 4 else -2
    width = states[layer].shape[1] if states[layer].dim() == 4 else states[layer].shape[2]
    return layer, width


def _load_whisper(model: UniMoeForCausalLM, whisper: WhisperForConditionalGeneration, shape: Shape) -> None:
    """Copy the encoder, its position table cut to the window, and start the query decoder as Whisper's decoder.

    The first two queries start as the embeddings of Whisper's own prompt (start of transcript, no timestamps): so the
    second one already decodes to the state from which Whisper would read off the first spoken word.
    """
    encoder, decoder = shortened_states(whisper, shape.window_seconds)
    model.model.speech_tower.load_state_dict(encoder)
    connector = model.model.speech_connector
    if not isinstance(connector, QueryDecoderConnector):
        return
    word_embeddings = decoder.pop("embed_tokens.weight")
    connector.decoder.load_state_dict(decoder)
    prompt = AutoTokenizer.from_pretrained(whisper.config._name_or_path).convert_tokens_to_ids(WHISPER_PROMPT)
    with torch.no_grad():
        embeddings = word_embeddings[prompt]
        connector.query_tokens[0, : len(embeddings)] = embeddings[: connector.query_tokens.shape[1]]


def _make_processor(decoder: Decoder, vision_folder: Path, speech_folder: Path, shape: Shape) -> UniMoeProcessor:
    image_processor = AutoImageProcessor.from_pretrained(vision_folder, backend="pil")
    if shape.image_size is not None:
        image_processor.size = {"height": shape.image_size, "width": shape.image_size}
        image_processor.do_center_crop = False
    whisper_features = WhisperFeatureExtractor.from_pretrained(speech_folder)
    return UniMoeProcessor(
        image_processor=image_processor,
        video_processor=UniMoeVideoProcessor.from_image_processor(image_processor, num_frames=shape.frames),
        feature_extractor=UniMoeFeatureExtractor(
            feature_size=whisper_features.feature_size,
            window_seconds=shape.window_seconds,
            speech=True,
            sound=True,
            sound_features="mel",  # the sound connector reads the speech tower
        ),
        tokenizer=decoder.tokenizer,
        chat_template=decoder.chat_template,
        image_tokens=shape.grid**2,
        video_tokens=shape.frames * shape.grid**2,
        speech_tokens=shape.speech_tokens,
        sound_tokens=shape.sound_tokens,
    )
