"""Files of torch.save: read without running code, refused when a download left them incomplete."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ...errors import ConversionError

_LFS_POINTER = b"version https://git-lfs"
# What torch.load raises on pickles that are damaged, too old to be mapped, or hold code.
UNPICKLING_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError)


def load_pickle(path: Path, *, mapped: bool = True) -> Any:
    """What torch.save wrote, on the CPU; code in it is not run.

    Args:
        mapped: leave tensors in the file until they are used, which files from before torch 1.6 do not allow.

    Raises:
        ConversionError: the file is damaged, of such an old form, or holds code.
    """
    refuse_truncated(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNPICKLING_ERRORS as error:
        raise ConversionError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}): it is damaged, or holds more than that. "
            "Pickles that hold code are never run; fetch the file again, or save its plain tensors anew."
        ) from error


def refuse_truncated(path: Path) -> None:
    """Raises ConversionError for a file that was not fetched, or one of torch.save whose end is missing."""
    with open(path, "rb") as file:
        begin = file.read(len(_LFS_POINTER))
    if begin == _LFS_POINTER:
        raise ConversionError(
            f"{path} is a pointer of Git LFS, not the file itself. Run `git lfs pull` in its folder."
        )
    if begin.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        raise ConversionError(
            f"{path} is truncated ({path.stat().st_size} bytes, its end is missing). Fetch it again."
        )
    if path.stat().st_size == 0:
        raise ConversionError(f"{path} is empty. Fetch it again.")


def refuse_damaged(path: Path) -> None:
    """Raises ConversionError for a file of torch.save whose content does not fit the checksums in it.

    It reads the whole file. Interrupted downloads in parts have the right size and end, and holes in between.
    """
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ConversionError(f"{path} is damaged ({error}). Fetch it again.") from error
    if damaged is not None:
        raise ConversionError(f"{path} is damaged: the checksum of {damaged} in it is wrong. Fetch it again.")
