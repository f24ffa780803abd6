"""Small media files and a small processor, made in memory."""

import io
import wave
from typing import Any

import numpy as np
import PIL.Image
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from unimoe.processing.feature_extraction_unimoe import UniMoeFeatureExtractor
from unimoe.processing.processing_unimoe import UniMoeProcessor, prepare_tokenizer
from unimoe.processing.video_processing_unimoe import UniMoeVideoProcessor

RATE = 16_000
SENTENCES = ["What is in the picture? A cat and a dog.", "Who speaks here? USER and ASSISTANT", "A blue bird sings."]


def tokenizer(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A `plain_tokenizer` with the tokens of media and chats."""
    made = plain_tokenizer(metaspace)
    prepare_tokenizer(made)
    return made


def plain_tokenizer(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, or one with SentencePiece's habit of putting a space before every text."""
    core = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        core.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    alphabet = [chr(c) for c in range(32, 127)] + ["\n"] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        SENTENCES * 3,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def image_processor() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def processor(modalities: str = "image video speech sound", **overrides: Any) -> UniMoeProcessor:
    """A processor for some modalities: 4 tokens per image, 5 per video, 3 speech and 2 sound tokens per window of 1 s."""
    wanted = set(modalities.split())
    pictures = image_processor()
    fields: dict[str, Any] = {"tokenizer": tokenizer()}
    if "image" in wanted:
        fields |= {"image_processor": pictures, "image_tokens": 4}
    if "video" in wanted:
        frames = UniMoeVideoProcessor.from_image_processor(pictures, num_frames=2)
        fields |= {"video_processor": frames, "video_tokens": 5}
    if wanted & {"speech", "sound"}:
        fields["feature_extractor"] = UniMoeFeatureExtractor(
            speech="speech" in wanted, sound="sound" in wanted, window_seconds=1.0
        )
        fields |= {"speech_tokens": 3 * ("speech" in wanted), "sound_tokens": 2 * ("sound" in wanted)}
    return UniMoeProcessor(**{**fields, **overrides})


def picture(seed: int = 0, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded_picture(kind: str = "PNG", seed: int = 0, height: int = 20, width: int = 24) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(picture(seed, height, width)).save(stream, kind)
    return stream.getvalue()


def sound(seconds: float = 0.5, seed: int = 0, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.4 * np.sin(2 * np.pi * 440 * time) + 0.01 * noise).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE, channels: int = 1) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return stream.getvalue()


def video(
    frames: int = 30,
    container: str = "mp4",
    codec: str = "libx264",
    size: int = 32,
    track: bool = False,
    gop: int = 250,
) -> bytes:
    """A clip that brightens from black to white at 25 frames per second, a key frame every `gop`, on request with a 440 Hz
    sound track at 22.05 kHz."""
    av = pytest.importorskip("av")
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as file:
        pictures = file.add_stream(codec, rate=25)
        pictures.width = pictures.height = size
        pictures.pix_fmt = "yuv420p"
        pictures.gop_size = gop
        sounds = file.add_stream("aac", rate=22_050) if track else None
        for index in range(frames):
            level = np.full((size, size, 3), round(255 * index / max(1, frames - 1)), np.uint8)
            file.mux(pictures.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        file.mux(pictures.encode())
        if sounds is not None:
            samples = av.AudioFrame.from_ndarray(sound(1.0, rate=22_050)[None], format="fltp", layout="mono")
            samples.sample_rate = 22_050
            file.mux(sounds.encode(samples))
            file.mux(sounds.encode())
    return stream.getvalue()
