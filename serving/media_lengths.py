"""How long recordings and videos are, by their headers: nothing is decoded unless a header does not say."""

import os
from dataclasses import dataclass
from typing import Any

from ..processing.media_audio_unimoe import audio_header, load_audio
from ..processing.media_container_unimoe import duration, open_container
from ..processing.media_policy_unimoe import MediaPolicy, refuse_on_failure
from ..processing.media_unimoe import open_media


@dataclass(frozen=True)
class Length:
    """How long a medium is.

    Args:
        samples: of audio, at the rate that towers hear; 0 for videos.
        decoding_bytes: of memory, while it is decoded.
        kept_bytes: of memory, until features are made of it.
    """

    seconds: float
    samples: int
    decoding_bytes: int
    kept_bytes: int


def audio_length(value: Any, target_rate: int, sampling_rate: int | None, policy: MediaPolicy, where: str) -> Length:
    """Of anything that `load_audio` reads; raises what it raises."""
    samples, rate, channels = audio_header(value, policy, where) if _is_file_or_its_bytes(value) else (0, 0, 0)
    if not samples:  # the clip is in memory, or its header does not say
        length = len(load_audio(value, target_rate, sampling_rate, policy, where))
        return Length(length / target_rate, length, 0, 4 * length)
    heard = round(samples * target_rate / rate)
    # Decoded, all channels and their mean.
    return Length(samples / rate, heard, 4 * samples * (channels + 1), 4 * heard)


def video_length(value: Any, num_frames: int, policy: MediaPolicy, where: str) -> Length:
    """Of a video file, of which so many frames are taken; frames in memory have no length."""
    if not _is_file_or_its_bytes(value):
        return Length(0.0, 0, 0, 0)
    guard = refuse_on_failure("video", where, "it is damaged or cannot be decoded")
    with (
        guard,
        open_media(value, "video", policy, where) as stream,
        open_container(stream, "video", where) as container,
    ):
        if not container.streams.video:
            return Length(0.0, 0, 0, 0)
        track = container.streams.video[0]
        pixels = track.width * track.height
        return Length(duration(container, track), 0, 6 * pixels, 3 * pixels * num_frames)


def _is_file_or_its_bytes(value: Any) -> bool:
    return isinstance(value, str | bytes | bytearray | memoryview | os.PathLike)
