"""The processor and the generation settings of a released Uni-MoE model."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..errors import ConversionError
from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..processing.chat_templates_unimoe import VICUNA_CHAT_TEMPLATE
from ..processing.chat_unimoe import MEDIA_TOKENS, prepare_tokenizer
from ..processing.feature_extraction_unimoe import UniMoeFeatureExtractor
from ..processing.processing_unimoe import UniMoeProcessor
from ..processing.processor_parts_unimoe import load_image_processor
from ..processing.video_processing_unimoe import UniMoeVideoProcessor
from .io import read_json
from .unimoe_config import PLACEHOLDERS

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_PREPROCESSOR = "preprocessor_config.json"


def load_tokenizer(*folders: Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first folder that holds one, with the placeholder tokens added; None where none does.

    Raises:
        ConversionError: see `read_tokenizer`.
    """
    found = (read_tokenizer(folder) for folder in folders if folder is not None)
    tokenizer = next((tokenizer for tokenizer in found if tokenizer is not None), None)
    if tokenizer is not None:
        prepare_tokenizer(tokenizer, chat_tokens=False)
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, as it is; None where there is none.

    Raises:
        ConversionError: its files are damaged, or a package that reads them is missing.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    _require_reader(folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConversionError(f"The tokenizer in {folder} cannot be read ({str(error).splitlines()[0]}).") from error


def _require_reader(folder: Path) -> None:
    """Without these packages transformers would make another tokenizer of a SentencePiece model, with a warning only."""
    if (folder / "tokenizer.json").is_file() or all(map(_is_installed, ("sentencepiece", "google.protobuf"))):
        return
    raise ConversionError(
        f"Reading {folder / 'tokenizer.model'} needs sentencepiece and protobuf: pip install 'unimoe[convert]'."
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def placeholder_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the placeholder tokens, by the names that `our_config` wants."""
    ids = tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS))
    return dict(zip(PLACEHOLDERS, ids, strict=True))  # type: ignore[arg-type]


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
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
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
        image_tokens=patches,
        video_tokens=patches,
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
