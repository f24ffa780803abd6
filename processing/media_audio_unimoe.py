"""Opens audio given as arrays, bytes, paths or allowed URLs, under limits, as mono samples at one rate."""

import io
import re
import wave
from typing import Any, BinaryIO

import numpy as np
import torch

from .media_container_unimoe import audio_track_header, read_audio_track
from .media_policy_unimoe import (
    DEFAULT_POLICY,
    MediaError,
    MediaPolicy,
    MissingPackageError,
    check_audio,
    refuse_on_failure,
)
from .media_unimoe import open_media

# First bytes of what libsndfile is allowed to open; the rest of its formats are rare and less tested.
_AUDIO_MAGIC = re.compile(
    rb"RIFF....WAVE|RF64....WAVE|FORM....AIF[FC]|fLaC|OggS|ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", re.S
)
# MP4, Matroska/WebM, ADTS AAC, AVI, FLV, MPEG, MPEG-TS, Ogg with pictures.
_CONTAINER_MAGIC = re.compile(
    rb"....ftyp|\x1aE\xdf\xa3|\xff[\xf1\xf9]|RIFF....AVI |FLV\x01|\x00\x00\x01\xba|G.{187}G|OggS.{24,56}theora", re.S
)
_INT_SCALE = {np.dtype(d): float(np.iinfo(d).max) + 1 for d in (np.int8, np.int16, np.int32)}


def load_audio(
    value: Any,
    target_rate: int = 16_000,
    sampling_rate: int | None = None,
    policy: MediaPolicy = DEFAULT_POLICY,
    where: str = "",
) -> np.ndarray:
    """Mono float32 samples [samples] at `target_rate` Hz, full scale = 1.

    Args:
        value: array or tensor ([samples], [channels, samples] or [samples, channels]; floats, or integers scaled by
            their range), a `(array, rate)` pair, a `{"array": ..., "sampling_rate": ...}` dict, bytes, path or URL.
        sampling_rate: rate of an array in Hz; None: `target_rate`. Files carry their own.

    Raises:
        MediaError: not decodable, empty, NaN or infinite, or outside of the limits on seconds, rate and channels.
        MissingPackageError: a package of `unimoe[audio]` is missing.
    """
    if isinstance(value, dict) and "array" in value:
        value, sampling_rate = value["array"], value.get("sampling_rate", sampling_rate)
    elif isinstance(value, tuple) and len(value) == 2 and np.ndim(value[1]) == 0:
        value, sampling_rate = value
    if isinstance(value, list | tuple):
        with refuse_on_failure("audio", where, "the list is not a list of numbers"):
            value = np.asarray(value, dtype=np.float32)
    if isinstance(value, np.ndarray | torch.Tensor):
        rate = target_rate if sampling_rate is None else sampling_rate
        samples = _samples_from_array(value, rate, policy, where)
    else:
        samples, rate = _read_audio(value, policy, where)
    if not np.isfinite(samples).all():
        raise MediaError("audio", "it holds NaN or infinite samples", where)
    return resample(samples.mean(axis=1, dtype=np.float32), int(rate), target_rate)


def resample(samples: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Samples [n] at another rate (soxr, high quality); the same array if the rates are equal."""
    if rate == target_rate:
        return samples
    try:
        import soxr
    except ImportError:
        raise MissingPackageError(
            f"Audio at {rate} Hz must be resampled to {target_rate} Hz: pip install 'unimoe[audio]'."
        ) from None
    resampled = soxr.resample(samples, rate, target_rate).astype(np.float32)
    return resampled if len(resampled) else np.zeros(1, np.float32)


def _samples_from_array(value: np.ndarray | torch.Tensor, rate: Any, policy: MediaPolicy, where: str) -> np.ndarray:
    """[samples, channels] float32 of an audio array; its size is checked before anything is computed."""
    if value.ndim not in (1, 2):
        raise MediaError(
            "audio", f"an array of shape {tuple(value.shape)} is no [samples] or [channels, samples]", where
        )
    channels, samples = (1, len(value)) if value.ndim == 1 else sorted(value.shape)
    if 0 in value.shape:
        raise MediaError("audio", "it is empty", where)
    check_audio(samples, rate, channels, policy, where)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    array = value[:, None] if value.ndim == 1 else (value if value.shape == (samples, channels) else value.T)
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused as such
            return array.astype(np.float32)
    if array.dtype in _INT_SCALE:
        return (array / _INT_SCALE[array.dtype]).astype(np.float32)
    raise MediaError("audio", f"its samples are {array.dtype}; use floats in -1..1, int16 or int32", where)


class _ClampedSeek(io.RawIOBase):
    """A stream for libsndfile, which seeks before the start on damaged files and then prints a traceback."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._stream.tell()}.get(whence)
        if base is None:
            base = self._stream.seek(0, io.SEEK_END)
        return self._stream.seek(min(max(0, base + offset), 1 << 62))

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _read_audio(value: Any, policy: MediaPolicy, where: str) -> tuple[np.ndarray, int]:
    """[samples, channels] float32 and the rate of an encoded clip."""
    with open_media(value, "audio", policy, where) as stream:
        head = _head(stream, where)
        if _CONTAINER_MAGIC.match(head):
            return read_audio_track(stream, policy, where)
        try:
            import soundfile
        except ImportError:
            return _read_wave(stream, head, policy, where)
        guard = refuse_on_failure("audio", where, "the audio file is damaged or incomplete")
        with guard, soundfile.SoundFile(_ClampedSeek(stream)) as file:
            rate = file.samplerate
            check_audio(file.frames, rate, file.channels, policy, where)
            samples = file.read(frames=file.frames, dtype="float32", always_2d=True)
        check_audio(len(samples), rate, samples.shape[1], policy, where)
        return samples, rate


def audio_header(value: Any, policy: MediaPolicy, where: str) -> tuple[int, int, int]:
    """Samples per channel, rate and channels of an encoded clip by its header; 0 samples if that does not say.

    Raises:
        MediaError: it is no audio, or outside of the limits.
    """
    with open_media(value, "audio", policy, where) as stream:
        head = _head(stream, where)
        if _CONTAINER_MAGIC.match(head):
            return audio_track_header(stream, policy, where)
        try:
            import soundfile
        except ImportError:
            samples, rate = _read_wave(stream, head, policy, where)
            return len(samples), rate, samples.shape[1]
        guard = refuse_on_failure("audio", where, "the audio file is damaged or incomplete")
        with guard, soundfile.SoundFile(_ClampedSeek(stream)) as file:
            check_audio(file.frames, file.samplerate, file.channels, policy, where)
            return file.frames, file.samplerate, file.channels


def _head(stream: BinaryIO, where: str) -> bytes:
    """The first bytes of a stream, which is back at its beginning."""
    head = stream.read(256)
    stream.seek(0)
    if not _CONTAINER_MAGIC.match(head) and not _AUDIO_MAGIC.match(head):
        reason = "not a readable audio file; accepted are WAV, FLAC, Ogg, MP3, AIFF, MP4, WebM and AAC"
        raise MediaError("audio", reason, where)
    return head


def _read_wave(stream: BinaryIO, head: bytes, policy: MediaPolicy, where: str) -> tuple[np.ndarray, int]:
    """PCM WAV through the standard library, for installations without soundfile."""
    if not head.startswith(b"RIFF"):
        raise MissingPackageError("Only WAV files can be read without soundfile: pip install 'unimoe[audio]'.")
    with refuse_on_failure("audio", where, "the WAV file is damaged, incomplete or not PCM"):
        with wave.open(stream) as file:
            width, channels, rate, frames = (
                file.getsampwidth(),
                file.getnchannels(),
                file.getframerate(),
                file.getnframes(),
            )
            check_audio(frames, rate, channels, policy, where)
            raw = np.frombuffer(file.readframes(frames), np.uint8)
        raw = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, width)
        if width == 1:
            values = raw[:, 0].astype(np.float32) / 128 - 1
        else:  # left-align in 32 bits, so that 16, 24 and 32 bit samples share one scale
            padded = np.zeros((len(raw), 4), np.uint8)
            padded[:, 4 - width :] = raw
            values = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    check_audio(len(values) // channels, rate, channels, policy, where)
    return values.reshape(-1, channels), rate
