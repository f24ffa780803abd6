"""What a conversation's media will take, said before any of them is decoded: tokens, and memory.

Lengths come from the headers of files, tokens from the processor's counts, and memory from going through the towers
without computing (`tracked_memory`) and from the shape of the decoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import psutil
import torch

from ..errors import RequestError, UniMoeError
from ..processing.chat_unimoe import MediaItem, read_messages
from .media_lengths import Length, audio_length, video_length
from .tracked_memory import peak_bytes

# Recordings up to so long are not worth a line, nor going through the towers for.
_SHORT_SECONDS = 30.0
# What operators take inside themselves on a CPU, where tensors are not all: measured by benchmarks/long_media.py.
_CPU_OVERHEAD = 1.1


@dataclass(frozen=True)
class Clip:
    """A recording or a video of a conversation: its length, and its windows or frames."""

    name: str
    seconds: float
    parts: int
    tokens: int

    def __str__(self) -> str:
        unit = "frame" if self.name == "video" else "window"
        length = f"{self.seconds / 60:.1f} min" if self.seconds >= 60 else f"{self.seconds:.1f} s"
        return f"{length} of {self.name}: {self.parts:,} {unit}{'s' * (self.parts != 1)}, {self.tokens:,} tokens"


@dataclass(frozen=True)
class Needs:
    """What one answer will take.

    Args:
        clips: recordings and videos, in their order.
        tokens: of the whole prompt.
        context: tokens that the model takes at most, answer included.
        memory: bytes beside the model, on its device.
        decoding_memory: bytes of the machine's memory to decode the media; part of `memory` on a CPU.
    """

    clips: Sequence[Clip]
    tokens: int
    context: int
    memory: int
    decoding_memory: int
    device: torch.device

    @property
    def is_worth_a_line(self) -> bool:
        return any(clip.seconds > _SHORT_SECONDS for clip in self.clips)

    def __str__(self) -> str:
        in_all = f"{self.tokens:,} tokens with the text, about {_size(self.memory)} of memory"
        return "; ".join([*map(str, self.clips), in_all])

    def require_room(self) -> None:
        """Refuse what the model or the machine has no room for.

        Raises:
            RequestError: the prompt is longer than the model takes.
            UniMoeError: more memory is needed than is free.
        """
        if self.tokens >= self.context:
            what = str(self) if self.clips else f"The conversation has {self.tokens:,} tokens, media included"
            less = (
                "Give a shorter part, fewer media, or audio through one branch alone (encoder 'speech' or 'sound'; in "
                "chat /speech and /sound)."
                if self.clips
                else "Shorten it."
            )
            raise RequestError(f"{what}; the model takes fewer than {self.context:,}. {less}")
        for memory, device in ((self.memory, self.device), (self.decoding_memory, torch.device("cpu"))):
            free = free_memory(device)
            if memory > free:
                raise UniMoeError(
                    f"{self}: {_size(memory)} are needed where {_size(free)} are free on {device}. Give a shorter part, "
                    "or free memory."
                )


class MediaPlanner:
    """Says what conversations will take from a model and its processor."""

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor, self.model = processor, model
        self._peaks: dict[tuple[Any, ...], int] = {}
        self._measuring = Lock()  # a server plans in several threads

    def needs(self, messages: list[dict[str, Any]], max_new_tokens: int) -> Needs:
        """What the answer to a conversation will take; opens the files, decodes none.

        Raises:
            MediaError, ConversationError: as the processor does.
        """
        policy = self.processor.media_policy
        plain, media = read_messages(messages, policy.limits)
        lengths = [self._length(item) for item in media]
        clips = [self._clip(item, length) for item, length in zip(media, lengths, strict=True)]
        images = sum(item.kind == "image" for item in media)
        written = self.processor._encoder(None).encode(plain, add_generation_prompt=True)
        text = len(written.input_ids) - len(media)
        tokens = text + images * self.processor.image_tokens + sum(clip.tokens for clip in clips if clip is not None)
        windows = {
            branch: sum(
                clip.parts
                for clip, item in zip(clips, media, strict=True)
                if clip is not None and item.kind == "audio" and item.encoder in (branch, "both")
            )
            for branch in ("speech", "sound")
        }
        videos = sum(item.kind == "video" for item in media)
        decoding = max((length.decoding_bytes for length in lengths if length is not None), default=0)
        kept = sum(length.kept_bytes for length in lengths if length is not None)
        is_long = any(clip is not None and clip.seconds > _SHORT_SECONDS for clip in clips)
        features, towers = self._encoding_memory(windows, images, videos) if is_long else (0, 0)
        text_config = self.model.config.get_text_config()
        decoder = _decoder_memory(text_config, tokens, max_new_tokens, self.model.dtype.itemsize)
        preparing = kept + max(decoding, features)
        on_cpu = self.model.device.type == "cpu"
        computing = features + round((_CPU_OVERHEAD if on_cpu else 1.0) * max(towers, decoder))
        return Needs(
            [clip for clip in clips if clip is not None],
            tokens,
            text_config.max_position_embeddings,
            max(preparing, computing) if on_cpu else computing,
            preparing,
            self.model.device,
        )

    def _length(self, item: MediaItem) -> Length | None:
        policy = self.processor.media_policy
        if item.kind == "audio":
            rate = self.processor.feature_extractor.sampling_rate if self._hears else 16_000
            return audio_length(item.value, rate, item.sampling_rate, policy, item.where)
        if item.kind == "video":
            frames = getattr(self.processor, "video_processor", None)
            return video_length(item.value, getattr(frames, "num_frames", 1), policy, item.where)
        return None

    @property
    def _hears(self) -> bool:
        return getattr(self.processor, "feature_extractor", None) is not None

    def _clip(self, item: MediaItem, length: Length | None) -> Clip | None:
        if length is None:
            return None
        processor = self.processor
        if item.kind == "video":
            frames = getattr(getattr(processor, "video_processor", None), "num_frames", 1)
            return Clip("video", length.seconds, frames, processor.video_tokens)
        windows = processor.feature_extractor.count_windows(max(1, length.samples)) if self._hears else 1
        per_window = {"speech": processor.speech_tokens, "sound": processor.sound_tokens}
        per_window["both"] = sum(per_window.values())
        name = "audio" if item.encoder == "both" else item.encoder
        return Clip(name, length.seconds, windows, windows * per_window[item.encoder])

    def _encoding_memory(self, windows: dict[str, int], images: int, videos: int) -> tuple[int, int]:
        """Bytes of the inputs of all towers, and the most that one of the branches takes beside them."""
        core, extractor = self.model.model, getattr(self.processor, "feature_extractor", None)
        shapes: dict[str, list[tuple[Any, ...]]] = {}
        if extractor is not None:
            frames = extractor.window_samples // extractor.hop_length
            mel = (extractor.feature_size, frames)
            if extractor.speech and windows["speech"]:
                shapes["speech_features"] = [(windows["speech"], *mel)]
            if extractor.sound and windows["sound"]:
                # As Kaldi counts them: whole frames of 25 ms.
                banks = (
                    1 + (extractor.window_samples - extractor.sampling_rate // 40) // (extractor.sampling_rate // 100),
                )
                shape = mel if extractor.sound_features == "mel" else (*banks, extractor.sound_mel_bins)
                shapes["audio_features"] = [(windows["sound"], *shape)]
        side = getattr(self.model.config.vision_config, "image_size", None)
        side = side if isinstance(side, int) else max(side or [224])
        if images:
            shapes["pixel_values"] = [(images, 3, side, side)]
        if videos:
            shapes["pixel_values_videos"] = [(videos, self.processor.video_processor.num_frames, 3, side, side)]
        features = sum(4 * torch.Size(shape).numel() for [shape] in shapes.values())
        branches: dict[str, Callable[..., Any]] = {
            "pixel_values": core.get_image_features,
            "pixel_values_videos": core.get_video_features,
        }
        peaks = [
            self._peak(name, shape, branches.get(name, core.get_audio_features)) for name, [shape] in shapes.items()
        ]
        return features, max(peaks, default=0)

    def _peak(self, name: str, shape: tuple[Any, ...], branch: Callable[..., Any]) -> int:
        key = (name, *shape)
        with self._measuring:
            if key not in self._peaks:
                device = self.model.device
                made = 4 * torch.Size(shape).numel()  # the inputs are counted apart
                self._peaks[key] = peak_bytes(lambda: branch(**{name: torch.empty(shape, device=device)})) - made
            return self._peaks[key]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def _decoder_memory(config: Any, tokens: int, new_tokens: int, itemsize: int) -> int:
    """Bytes of keys and values of prompt and answer, and of one layer at work on the prompt."""
    heads = config.num_attention_heads * config.head_dim
    key_values = config.num_key_value_heads * config.head_dim
    cache = 2 * config.num_hidden_layers * key_values * (tokens + new_tokens)
    chosen = config.num_experts_per_tok if config.sparse_layers else 1
    width = max(config.intermediate_size, chosen * config.moe_intermediate_size if config.sparse_layers else 0)
    layer = tokens * (4 * config.hidden_size + 2 * heads + 4 * key_values + 3 * width)
    return itemsize * (cache + layer)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{max(1, round(count / 1e6))} MB"


__all__ = ["Clip", "MediaPlanner", "Needs", "free_memory"]
