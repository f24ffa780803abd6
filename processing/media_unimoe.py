"""Opens images and audio given as arrays, PIL images, bytes, paths or (when allowed) URLs, under limits.

This module and its siblings `media_fetch_unimoe` (URLs) and `media_video_unimoe` (videos) are the only places that
open a path or a URL. Every refusal is a `MediaError` that names the place in the input and the reason.
"""

import io
import os
import re
import stat
import warnings
import wave
import zipfile
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from .media_fetch_unimoe import fetch, is_url
from .media_policy_unimoe import (
    DEFAULT_POLICY,
    ConversationError,
    MediaError,
    MediaLimits,
    MediaPolicy,
    PlaceholderError,
    UniMoeError,
    refuse_on_failure,
)

__all__ = [
    "DEFAULT_POLICY",
    "ConversationError",
    "MediaError",
    "MediaLimits",
    "MediaPolicy",
    "PlaceholderError",
    "UniMoeError",
    "load_audio",
    "load_image",
    "open_media",
    "resample",
]

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")
_SUFFIXES = {
    "image": {".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pbm"},
    "audio": {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".m4a", ".aac"},
    "video": {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ogv", ".mpg", ".mpeg", ".ts", ".flv", ".gif"},
}
_SUFFIXES["audio"] |= _SUFFIXES["video"] - {".gif"}  # a video's own sound track is audio too
_KNOWN_SUFFIXES = set().union(*_SUFFIXES.values())
_DEVICE_NAMES = re.compile(r"(?:CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?:\..*)?", re.IGNORECASE)
# First bytes of what libsndfile is allowed to open; the rest of its formats are rare and less tested.
_AUDIO_MAGIC = re.compile(
    rb"RIFF....WAVE|RF64....WAVE|FORM....AIF[FC]|fLaC|OggS|ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", re.S
)
# MP4, Matroska/WebM, ADTS AAC, AVI, FLV, MPEG, MPEG-TS, Ogg with pictures.
_CONTAINER_MAGIC = re.compile(
    rb"....ftyp|\x1aE\xdf\xa3|\xff[\xf1\xf9]|RIFF....AVI |FLV\x01|\x00\x00\x01\xba|G.{187}G|OggS.{24,56}theora", re.S
)
_INT_SCALE = {np.dtype(d): float(np.iinfo(d).max) + 1 for d in (np.int8, np.int16, np.int32)}


def open_media(value: Any, kind: str, policy: MediaPolicy = DEFAULT_POLICY, where: str = "") -> BinaryIO:
    """A seekable binary stream over bytes, a path, or a URL that the policy allows; the caller closes it.

    Raises:
        MediaError: wrong type, missing, outside of `media_root`, not a regular file, empty or too big.
    """
    if isinstance(value, str) and is_url(value):
        value = fetch(value, policy, kind, where)
    if isinstance(value, bytes | bytearray | memoryview):
        stream: BinaryIO = io.BytesIO(value)
        size = len(value)
    elif isinstance(value, str | os.PathLike):
        stream = _open_path(os.fspath(value), kind, policy, where)
        size = os.fstat(stream.fileno()).st_size
    else:
        raise MediaError(kind, f"cannot read a value of type {type(value).__name__}", where)
    if not 0 < size <= policy.limits.max_file_bytes:
        stream.close()
        raise MediaError(kind, f"it has {size} bytes; allowed are 1 to {policy.limits.max_file_bytes}", where)
    return stream


def load_image(value: Any, policy: MediaPolicy = DEFAULT_POLICY, where: str = "") -> PIL.Image.Image:
    """An RGB image, upright by its EXIF orientation; of animations the first frame.

    Args:
        value: PIL image, array or tensor ([H, W], [H, W, 1|3|4] or [1|3|4, H, W]; uint8, or floats in 0..1), bytes,
            path or allowed URL.

    Raises:
        MediaError: not an image of `IMAGE_FORMATS`, damaged, also a ZIP archive, or over `max_image_pixels`.
    """
    if isinstance(value, PIL.Image.Image):
        _check_pixels(value.size, policy, where)
        with refuse_on_failure("image", where, "the PIL image cannot be read"):
            return value.convert("RGB")
    if isinstance(value, np.ndarray | torch.Tensor):
        return _image_from_array(value, policy, where)
    with open_media(value, "image", policy, where) as stream:
        if zipfile.is_zipfile(stream):
            raise MediaError("image", "the file is also a ZIP archive", where)
        stream.seek(0)
        image = _open_image(stream, policy, where)
        _check_pixels(image.size, policy, where)
        with refuse_on_failure("image", where, "the image is damaged or incomplete"):
            if "transparency" in image.info:  # a palette with alpha: straight to RGB would lose it with a warning
                image = image.convert("RGBA")
            return PIL.ImageOps.exif_transpose(image).convert("RGB")


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
        ImportError: a package of `unimoe[audio]` is missing.
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
        raise ImportError(
            f"Audio at {rate} Hz must be resampled to {target_rate} Hz: pip install 'unimoe[audio]'."
        ) from None
    resampled = soxr.resample(samples, rate, target_rate).astype(np.float32)
    return resampled if len(resampled) else np.zeros(1, np.float32)


def check_audio(samples: int, rate: Any, channels: int, policy: MediaPolicy, where: str) -> None:
    """Refuse, from header figures alone, audio outside of the limits."""
    limits = policy.limits
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not float(rate).is_integer():
        raise MediaError("audio", f"its sampling rate must be a whole number of Hz, got {rate!r}", where)
    if not limits.min_sampling_rate <= rate <= limits.max_sampling_rate:
        allowed = f"{limits.min_sampling_rate} to {limits.max_sampling_rate}"
        raise MediaError("audio", f"its sampling rate is {rate} Hz; allowed are {allowed} Hz", where)
    if not 1 <= channels <= limits.max_audio_channels:
        raise MediaError("audio", f"it has {channels} channels; allowed are 1 to {limits.max_audio_channels}", where)
    if samples < limits.min_audio_samples:
        raise MediaError("audio", "it is empty", where)
    if samples > limits.max_audio_seconds * rate:
        seconds = f"{samples / rate:.0f} s; allowed are {limits.max_audio_seconds:g} s"
        raise MediaError("audio", f"it lasts {seconds}", where)


def _open_path(path: str | bytes, kind: str, policy: MediaPolicy, where: str) -> BinaryIO:
    text = os.fsdecode(path)
    if not policy.allow_paths:
        raise MediaError(kind, "paths are refused by the media policy; send bytes or arrays", where)
    if "\0" in text or not text.strip():
        raise MediaError(kind, "the path is empty or holds a NUL character", where)
    if any(_DEVICE_NAMES.fullmatch(part.strip()) for part in re.split(r"[/\\]", text)):
        raise MediaError(kind, "the path names a device", where)
    suffix = PurePath(text).suffix.lower()
    if suffix in _KNOWN_SUFFIXES - _SUFFIXES[kind]:
        raise MediaError(kind, f"a file that ends in {suffix} is no {kind}", where)
    try:
        root = None if policy.media_root is None else Path(policy.media_root).resolve(strict=True)
        real = Path(text if root is None else root / text).resolve(strict=True)
        if root is not None and not real.is_relative_to(root):
            raise MediaError(kind, "the path leads outside of media_root", where)
        # Not blocking, so that a named pipe cannot hang the open; not following, as `real` holds no links any more.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        stream = os.fdopen(os.open(real, flags), "rb")
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(kind, f"the file cannot be opened: {PurePath(text).name[:80]!r}", where) from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise MediaError(kind, "the path is not a regular file", where)
    return stream


def _open_image(stream: BinaryIO, policy: MediaPolicy, where: str) -> PIL.Image.Image:
    reason = f"not a readable image; accepted formats are {', '.join(IMAGE_FORMATS)}"
    with refuse_on_failure("image", where, reason), warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit is stricter
        try:
            return PIL.Image.open(stream, formats=IMAGE_FORMATS)
        except PIL.Image.DecompressionBombError:
            allowed = policy.limits.max_image_pixels
            raise MediaError("image", f"it has far more pixels than the {allowed} allowed", where) from None


def _check_pixels(size: tuple[int, int], policy: MediaPolicy, where: str) -> None:
    width, height = size
    if width < 1 or height < 1 or width * height > policy.limits.max_image_pixels:
        allowed = policy.limits.max_image_pixels
        raise MediaError("image", f"it has {width} x {height} pixels; allowed are 1 to {allowed} in all", where)


def _image_from_array(value: np.ndarray | torch.Tensor, policy: MediaPolicy, where: str) -> PIL.Image.Image:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise MediaError("image", f"an array of shape {tuple(value.shape)} is no [H, W, 3] or [3, H, W] image", where)
    _check_pixels((array.shape[1], array.shape[0]), policy, where)
    array = _to_uint8(array, where)
    return PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)).convert("RGB")


def _to_uint8(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array) or not np.isfinite(array).all():
        raise MediaError("image", "its array must hold finite real numbers", where)
    low, high = float(array.min()), float(array.max())
    top = 1.0 if np.issubdtype(array.dtype, np.floating) else 255.0
    if low < 0 or high > top:
        raise MediaError(
            "image", f"its values span {low:g} to {high:g}; use uint8 0..255 or floats 0..1, before normalising", where
        )
    return np.rint(array * (255.0 / top)).astype(np.uint8)


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
        head = stream.read(256)
        stream.seek(0)
        if _CONTAINER_MAGIC.match(head):
            from .media_video_unimoe import read_audio_track

            return read_audio_track(stream, policy, where)
        if not _AUDIO_MAGIC.match(head):
            reason = "not a readable audio file; accepted are WAV, FLAC, Ogg, MP3, AIFF, MP4, WebM and AAC"
            raise MediaError("audio", reason, where)
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


def _read_wave(stream: BinaryIO, head: bytes, policy: MediaPolicy, where: str) -> tuple[np.ndarray, int]:
    """PCM WAV through the standard library, for installations without soundfile."""
    if not head.startswith(b"RIFF"):
        raise ImportError("Only WAV files can be read without soundfile: pip install 'unimoe[audio]'.")
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
