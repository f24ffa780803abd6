"""Opens video and audio containers through PyAV, and reads the sound track of one."""

import re
from typing import Any, BinaryIO

import numpy as np

from .media_policy_unimoe import MediaError, MediaPolicy, MissingPackageError, check_audio, refuse_on_failure

# The demuxer is forced by the file's first bytes: left to guess, it would also open playlists, which name other files.
_DEMUXERS = (
    (re.compile(rb"....ftyp", re.S), "mov"),
    (re.compile(rb"\x1aE\xdf\xa3"), "matroska"),
    (re.compile(rb"RIFF....AVI ", re.S), "avi"),
    (re.compile(rb"OggS"), "ogg"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"FLV\x01"), "flv"),
    (re.compile(rb"\x00\x00\x01\xba"), "mpeg"),
    (re.compile(rb"G.{187}G", re.S), "mpegts"),
    (re.compile(rb"\xff[\xf1\xf9]"), "aac"),
)


def open_container(stream: BinaryIO, kind: str, where: str) -> Any:
    """A PyAV container over a stream, closed by the caller.

    Raises:
        MediaError: the first bytes are those of no known container.
        MissingPackageError: PyAV (`unimoe[video]`) is missing.
    """
    try:
        import av
    except ImportError:
        raise MissingPackageError("Reading videos and their sound needs PyAV: pip install 'unimoe[video]'.") from None
    stream.seek(0)
    head = stream.read(256)
    stream.seek(0)
    demuxer = next((name for magic, name in _DEMUXERS if magic.match(head)), None)
    if demuxer is None:
        raise MediaError(kind, "not a readable video; accepted are MP4/MOV, MKV/WebM, AVI, Ogg, MPEG, FLV, GIF", where)
    return av.open(stream, format=demuxer, options={"protocol_whitelist": "none"})


def duration(container: Any, track: Any) -> float:
    """Seconds by the header; 0.0 if it does not say."""
    if track.duration is not None and track.time_base is not None:
        return max(0.0, float(track.duration * track.time_base))
    return max(0.0, (container.duration or 0) / 1_000_000)


def read_audio_track(stream: BinaryIO, policy: MediaPolicy, where: str) -> tuple[np.ndarray, int]:
    """[samples, channels] float32 and the rate of the first sound track in a container."""
    guard = refuse_on_failure("audio", where, "the sound track is damaged or cannot be decoded")
    with guard, open_container(stream, "audio", where) as container:
        track, _, rate, channels = _checked_track(container, policy, where)
        blocks, total = [], 0
        for frame in container.decode(track):
            block = _frame_samples(frame)
            total += len(block)
            if frame.sample_rate != rate or block.shape[1] != channels:
                raise MediaError("audio", "its format changes within the clip", where)
            check_audio(total, rate, channels, policy, where)
            blocks.append(block)
    if not blocks:
        raise MediaError("audio", "it is empty", where)
    samples = np.concatenate(blocks)
    if not np.isfinite(samples).all():
        raise MediaError("audio", "it holds NaN or infinite samples", where)
    return samples, rate


def audio_track_header(stream: BinaryIO, policy: MediaPolicy, where: str) -> tuple[int, int, int]:
    """Samples per channel (0: the container does not say), rate and channels of the first sound track in a container."""
    guard = refuse_on_failure("audio", where, "the sound track is damaged or cannot be decoded")
    with guard, open_container(stream, "audio", where) as container:
        _, samples, rate, channels = _checked_track(container, policy, where)
        return samples, rate, channels


def _checked_track(container: Any, policy: MediaPolicy, where: str) -> tuple[Any, int, int, int]:
    """The first sound track, with samples, rate and channels by its header."""
    if not container.streams.audio:
        raise MediaError("audio", "the file has no sound track; of a silent video leave sound_track out", where)
    track = container.streams.audio[0]
    rate, channels = int(track.rate or 0), int(track.channels or 0)
    samples = int(duration(container, track) * rate)
    check_audio(max(1, samples), rate, channels, policy, where)
    return track, samples, rate, channels


def _frame_samples(frame: Any) -> np.ndarray:
    array = frame.to_ndarray()
    channels = frame.layout.nb_channels
    array = array.T if frame.format.is_planar else array.reshape(-1, channels)
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 128 - 1
    return (array / (float(np.iinfo(array.dtype).max) + 1)).astype(np.float32)
