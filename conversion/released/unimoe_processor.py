"""The processor and the generation settings of a released Uni-MoE model."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.chat_templates_unimoe import VICUNA_CHAT_TEMPLATE
from ...processing.chat_unimoe import prepare_tokenizer
from ...processing.feature_extraction_unimoe import UniMoeFeatureExtractor
from ...processing.processing_unimoe import UniMoeProcessor
from ...processing.processor_parts_unimoe import load_image_processor
from ...processing.video_processing_unimoe import UniMoeVideoProcessor
from ..dense.encoder_folders import preprocessor_settings, whisper_features
from ..dense.picture_processor import image_features
from ..dense.tokenizer_files import read_tokenizer


def load_tokenizer(folder: Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, with the placeholder tokens added; None where there is none.

    Raises:
        ConversionError: see `read_tokenizer`.
    """
    tokenizer = None if folder is None else read_tokenizer(folder)
    if tokenizer is not None:
        prepare_tokenizer(tokenizer, chat_tokens=False)
    return tokenizer


def require_fitting_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab_size: int) -> None:
    """Raises ConversionError where the tokenizer's pieces, those added to it aside, are more than the embeddings."""
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size:,} pieces, but the model embeds {vocab_size:,}: it is "
            "that of another model. Put the base model's own tokenizer there."
        )


def build_processor(
    config: UniMoeConfig,
    tokenizer: PreTrainedTokenizerBase,
    clip: Path,
    whisper: Path | None,
    image_aspect_ratio: str = "square",
) -> UniMoeProcessor:
    """A processor that prepares inputs as the original does.

    Args:
        clip, whisper: the encoders' folders with their preprocessor_config.json.
        image_aspect_ratio: of the original's config.json, where everything but "pad" leaves pictures as they are.
    """
    pictures = load_image_processor(preprocessor_settings(clip), str(clip))
    image_tokens = image_features(config)
    speech, sound = config.speech_connector, config.sound_connector
    return UniMoeProcessor(
        image_processor=pictures,
        video_processor=UniMoeVideoProcessor.from_image_processor(
            pictures, num_frames=config.video_num_frames, sampling="unimoe"
        ),
        feature_extractor=_feature_extractor(config, whisper),
        tokenizer=tokenizer,
        chat_template=VICUNA_CHAT_TEMPLATE,
        tokenization="spaced",  # the token ids that the released models were trained with
        image_aspect_ratio="pad" if image_aspect_ratio == "pad" else "square",
        image_tokens=image_tokens,
        video_tokens=image_tokens,
        speech_tokens=speech.num_tokens if speech is not None else 0,
        sound_tokens=sound.num_tokens if sound is not None else 0,
    )


def generation_config(config: UniMoeConfig) -> GenerationConfig:
    """What the original's inference scripts use: temperature 0.2, up to 1024 new tokens."""
    text = config.text_config
    inside = [i for i in config.placeholder_ids.values() if i is not None and i < text.vocab_size]
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=True,
        temperature=0.2,
        max_new_tokens=1024,
        suppress_tokens=inside or None,
    )


def _feature_extractor(config: UniMoeConfig, whisper: Path | None) -> UniMoeFeatureExtractor:
    if config.speech_connector is None or whisper is None:
        return UniMoeFeatureExtractor(speech=False, sound=True)
    return UniMoeFeatureExtractor(speech=True, **whisper_features(whisper, config.speech_config.num_mel_bins))
