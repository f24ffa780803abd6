"""The processor of a composed model: the tokenizer with its placeholders, a chat template, and how media are prepared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...errors import ConversionError, UniMoeError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.chat_templates_unimoe import (
    BUNNY_SEPARATORS,
    DEFAULT_CHAT_TEMPLATE,
    VICUNA_CHAT_TEMPLATE,
    bunny_chat_templates,
)
from ...processing.chat_unimoe import CHAT_TOKENS, prepare_tokenizer
from ...processing.feature_extraction_unimoe import UniMoeFeatureExtractor
from ...processing.processing_unimoe import UniMoeProcessor
from ...processing.video_processing_unimoe import UniMoeVideoProcessor
from ..checkpoints.meta_model import BUILDING_ERRORS, first_line, meta_model
from ..dense.prepared_tokenizers import prepare_bunny_tokenizer
from ..dense.sources import Source
from ..dense.tokenizer_files import read_tokenizer
from .vision_part import picture_size

CHAT_TEMPLATES = ("chatml", "vicuna", "llama", "phi3")
# What ends an answer; a tokenizer that has it was most likely trained on such answers.
_ENDS = {"vicuna": "</s>", "llama": BUNNY_SEPARATORS["llama"][1], "phi3": BUNNY_SEPARATORS["phi3"][1]}
# A SentencePiece tokenizer's mark of a space, which it puts before every text.
_SPACE = "▁"


@dataclass(frozen=True)
class Chat:
    """How conversations become token ids.

    Args:
        template: one, or several by name: with "llama" and "phi3" also "plain", for the captions of a stage 1.
        name: of `CHAT_TEMPLATES`, or what the template was read from.
        tokenization: see `UniMoeProcessor`.
        end_of_answer: the token that ends an answer, if the template is one of ours.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Any
    name: str
    tokenization: str
    end_of_answer: str | None


def prepare_chat(source: Source, wanted: str | None) -> Chat:
    """The language model's tokenizer, grown by the placeholders, with a chat template.

    A language model's own template knows no media, and does not say which words are answers. So the one of ours is taken
    that ends answers as the tokenizer does.

    Args:
        wanted: a name of `CHAT_TEMPLATES`, a file with a Jinja template, or the template itself; None chooses. A dense
            model of ours keeps its own then.

    Raises:
        ConversionError: there is no tokenizer or no such template.
    """
    tokenizer = read_tokenizer(source.folder)
    if tokenizer is None:
        raise ConversionError(
            f"{source.folder} holds no tokenizer (tokenizer.json or tokenizer.model), and nothing composed of it could read. "
            "Fetch it."
        )
    own = own_processor(source)
    if wanted is None and own is not None:
        prepare_tokenizer(tokenizer, chat_tokens=False)
        return Chat(tokenizer, own.chat_template, "its own", own.tokenization, None)
    name = wanted or _usual_template(tokenizer)
    if name == "chatml":
        prepare_tokenizer(tokenizer)
        return Chat(tokenizer, DEFAULT_CHAT_TEMPLATE, name, "plain", CHAT_TOKENS[1])
    if name in _ENDS:
        _require_token(tokenizer, _ENDS[name], name)
        if name in BUNNY_SEPARATORS:
            prepare_bunny_tokenizer(tokenizer, name)
            return Chat(tokenizer, bunny_chat_templates(name, tokenizer), name, "plain", _ENDS[name])
        prepare_tokenizer(tokenizer, chat_tokens=False)
        spaced = _begins_with_space(tokenizer)  # as Vicuna and LLaVA were trained
        return Chat(tokenizer, VICUNA_CHAT_TEMPLATE, name, "spaced" if spaced else "plain", _ENDS[name])
    template, named = _read_template(name)
    prepare_tokenizer(tokenizer, chat_tokens=CHAT_TOKENS[0] in template)
    return Chat(tokenizer, template, named, "plain", None)


def own_processor(source: Source) -> UniMoeProcessor | None:
    """The processor that lies with a dense model of ours."""
    if source.kind != "unimoe" or not (source.folder / "processor_config.json").is_file():
        return None
    return UniMoeProcessor.from_pretrained(source.folder)


def audio_features(config: UniMoeConfig, features: dict[str, Any]) -> UniMoeFeatureExtractor | None:
    """What makes windows of features for the branches that a configuration has; None without any.

    Args:
        features: settings of Whisper's spectrogram and `window_seconds`, see `OpenedParts.audio_settings`.

    Raises:
        ConversionError: the window is impossible.
    """
    speech, sound = config.speech_connector is not None, config.sound_connector is not None
    if not speech and not sound:
        return None
    settings = dict(features)
    if config.audio_config is not None:
        settings["sound_mel_bins"] = getattr(config.audio_config, "num_mel_bins", 128)
    kind = "mel" if config.audio_config is None else "fbank"
    try:
        return UniMoeFeatureExtractor(speech=speech, sound=sound, sound_features=kind, **settings)
    except ValueError as error:
        raise ConversionError(f"The audio windows are impossible: {error}") from error


def build_composed_processor(
    config: UniMoeConfig, chat: Chat, pictures: Any, audio: UniMoeFeatureExtractor | None, image_aspect_ratio: str
) -> UniMoeProcessor:
    """The processor of a configuration; media have as many placeholders as the model makes features of them."""
    image_tokens = 0 if config.image_connector is None else measured_image_features(config, picture_size(pictures))
    video_tokens = image_tokens if config.video_pooling == "mean" else config.video_num_frames * image_tokens
    videos = None
    if pictures is not None:
        videos = UniMoeVideoProcessor.from_image_processor(pictures, num_frames=config.video_num_frames)
    tokens = {
        name: 0 if connector is None else connector.num_tokens
        for name, connector in (("speech", config.speech_connector), ("sound", config.sound_connector))
    }
    return UniMoeProcessor(
        image_processor=pictures,
        video_processor=videos,
        feature_extractor=audio,
        tokenizer=chat.tokenizer,
        chat_template=chat.template,
        tokenization=chat.tokenization,
        image_aspect_ratio=image_aspect_ratio,
        image_tokens=image_tokens,
        video_tokens=video_tokens,
        speech_tokens=tokens["speech"],
        sound_tokens=tokens["sound"],
    )


@torch.no_grad()
def measured_image_features(config: UniMoeConfig, size: tuple[int, int]) -> int:
    """Features of a picture of so many pixels, as the model itself makes them, without memory.

    Raises:
        ConversionError, ConfigurationError: the tower does not take such pictures, or its states cannot be pooled so.
    """
    model, pixels = meta_model(config).eval().model, torch.zeros(1, 3, *size, device="meta")
    try:
        return int(model.encode_image(pixels).shape[1])
    except UniMoeError:
        raise
    except BUILDING_ERRORS as error:
        raise ConversionError(
            f"The vision tower does not take pictures of {size[0]} x {size[1]} pixels ({first_line(error)}). Give another "
            "--image-size, or leave it out."
        ) from error


def composed_generation(source: Source, config: UniMoeConfig, chat: Chat) -> GenerationConfig:
    """The source's settings; answers end as the template ends them, and hold no placeholders."""
    text, path = config.text_config, source.folder / "generation_config.json"
    generation = (
        GenerationConfig.from_pretrained(source.folder) if path.is_file() else GenerationConfig.from_model_config(text)
    )
    own = generation.eos_token_id if generation.eos_token_id is not None else text.eos_token_id
    ends = list(own) if isinstance(own, list) else [own]
    ends.append(chat.tokenizer.eos_token_id)
    if chat.end_of_answer is not None:
        ends.append(chat.tokenizer.convert_tokens_to_ids(chat.end_of_answer))
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    generation.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if generation.pad_token_id is None:
        pads = (text.pad_token_id, chat.tokenizer.pad_token_id)
        generation.pad_token_id = next((pad for pad in pads if pad is not None), None)
    generation.suppress_tokens = sorted(i for i in config.placeholder_ids.values() if i is not None)
    return generation


def _usual_template(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = tokenizer.get_vocab()
    if all(token in vocabulary for token in CHAT_TOKENS):
        return "chatml"
    for name, end in _ENDS.items():
        if tokenizer.eos_token == end:
            return name
    return "llama" if _ENDS["llama"] in vocabulary else "chatml"


def _require_token(tokenizer: PreTrainedTokenizerBase, token: str, name: str) -> None:
    if token not in tokenizer.get_vocab():
        raise ConversionError(
            f"The chat template {name!r} ends answers with {token}, which the tokenizer lacks. Choose another one of "
            f"{', '.join(CHAT_TEMPLATES)}, or give a file."
        )


def _begins_with_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.tokenize("a")[:1] in ([_SPACE], [_SPACE + "a"])


def _read_template(given: str) -> tuple[str, str]:
    """A Jinja template and what to call it."""
    if "{" in given:
        return given, "given"
    path = Path(given)
    if not path.is_file():
        raise ConversionError(
            f"--chat-template is {given!r}; use one of {', '.join(CHAT_TEMPLATES)}, or a file with a Jinja template."
        )
    return path.read_text(encoding="utf-8"), path.name


__all__ = [
    "CHAT_TEMPLATES",
    "Chat",
    "audio_features",
    "build_composed_processor",
    "composed_generation",
    "own_processor",
    "prepare_chat",
]
