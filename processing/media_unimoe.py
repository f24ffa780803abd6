"""Opens files and images given as arrays, PIL images, bytes, paths or (when allowed) URLs, under limits.

`open_media` and its sibling `media_fetch_unimoe` (URLs) are the only places that open what a message names; audio and
videos go through them too. Every refusal is a `MediaError` that names the place in the input and the reason.
"""

import io
import os
import re
import stat
import warnings
import zipfile
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from .media_fetch_unimoe import fetch, is_url, place_of
from .media_policy_unimoe import DEFAULT_POLICY, MediaError, MediaPolicy, refuse_on_failure

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")
_SUFFIXES = {
    "image": {".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pbm"},
    "audio": {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".m4a", ".aac"},
    "video": {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ogv", ".mpg", ".mpeg", ".ts", ".flv", ".gif"},
}
_SUFFIXES["audio"] |= _SUFFIXES["video"] - {".gif"}  # a video's own sound track is audio too
_KNOWN_SUFFIXES = set().union(*_SUFFIXES.values())
_DEVICE_NAMES = re.compile(r"(?:CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?:\..*)?", re.IGNORECASE)


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


def load_image(
    value: Any, policy: MediaPolicy = DEFAULT_POLICY, where: str = "", mode: Literal["RGB", "RGBA"] = "RGB"
) -> PIL.Image.Image:
    """An image, upright by its EXIF orientation; of animations the first frame.

    Args:
        value: PIL image, array or tensor ([H, W], [H, W, 1|3|4] or [1|3|4, H, W]; uint8, or floats in 0..1), bytes,
            path or allowed URL.
        mode: "RGBA" keeps transparency; "RGB" shows what is transparent on white.

    Raises:
        MediaError: not an image of `IMAGE_FORMATS`, damaged, also a ZIP archive, over `max_image_pixels`, or grey with
            32 bits, which have no common black and white (16 bits have, and become 8).
    """
    if isinstance(value, PIL.Image.Image):
        _check_pixels(value.size, policy, where, is_decoded=type(value) is PIL.Image.Image)
        with refuse_on_failure("image", where, "the PIL image cannot be read"):
            return _in_mode(_in_eight_bits(value, value.format, where), mode)
    if isinstance(value, np.ndarray | torch.Tensor):
        return _in_mode(_image_from_array(value, policy, where), mode)
    with open_media(value, "image", policy, where) as stream:
        if _is_archive(stream):
            raise MediaError("image", "the file is also a ZIP archive", where)
        stream.seek(0)
        image = _open_image(stream, policy, where)
        _check_pixels(image.size, policy, where)
        with refuse_on_failure("image", where, "the image is damaged or incomplete"):
            upright = PIL.ImageOps.exif_transpose(image)
            return _in_mode(_in_eight_bits(upright, image.format, where), mode)


def _is_archive(stream: BinaryIO) -> bool:
    """Whether the file is a ZIP archive too. Its four bytes alone stand in one of some 65,000 large pictures by chance."""
    if not zipfile.is_zipfile(stream):
        return False
    try:
        zipfile.ZipFile(stream).close()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
    ):  # ValueError: a directory before the file's beginning
        return False
    return True


def _open_path(path: str | bytes, kind: str, policy: MediaPolicy, where: str) -> BinaryIO:
    text = os.fsdecode(path)
    if not policy.allow_paths:
        raise MediaError(kind, "paths are refused by the media policy; send bytes or arrays", where)
    where = place_of(text, where)
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
        why = "there is no such file" if isinstance(error, FileNotFoundError) else "the file cannot be opened"
        raise MediaError(kind, why, where) from None
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


def _check_pixels(size: tuple[int, int], policy: MediaPolicy, where: str, is_decoded: bool = False) -> None:
    width, height = size
    allowed = policy.limits.max_image_pixels * (2 if is_decoded else 1)
    if width < 1 or height < 1 or width * height > allowed:
        raise MediaError("image", f"it has {width} x {height} pixels; allowed are 1 to {allowed} in all", where)


def _in_eight_bits(image: PIL.Image.Image, file_format: str | None, where: str) -> PIL.Image.Image:
    """The image with 8 bits per channel; PIL itself would clip 16 bits to black and white."""
    # Some versions of PIL open the 16 bits of these files as 32.
    is_sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not is_sixteen_bit:
        raise MediaError(
            "image",
            f"its mode {image.mode!r} has 32 bits per pixel and no fixed black and white; scale it to 0..255 and "
            "convert it to mode 'L' first",
            where,
        )
    if not is_sixteen_bit:
        return image
    values = np.asarray(image)
    grey = PIL.Image.fromarray(np.rint(values.clip(0, 65_535) / 257).astype(np.uint8))
    if isinstance(hidden := image.info.get("transparency"), int):
        grey.putalpha(PIL.Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _in_mode(image: PIL.Image.Image, mode: Literal["RGB", "RGBA"]) -> PIL.Image.Image:
    if mode == "RGB" and image.has_transparency_data:  # straight to RGB would show colours that nobody was to see
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


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
    return PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


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
