"""Tensors written, and read again: a disk or a file system that returns something else is noticed at once."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...errors import ConversionError
from .checkpoint_reader import Checkpoint, TensorFile
from .checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor, write_checkpoint

_BLOCK = 1 << 22  # bytes that are read at once


@dataclass(frozen=True)
class WrittenTensors:
    """What was written. `digests`: SHA-256 of every tensor's bytes; `seconds`: of the writing alone."""

    files: list[Path]
    digests: dict[str, str]
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        """The fields of a `SavedReceipt` that say so."""
        return {
            "bytes_written": sum(path.stat().st_size for path in self.files),
            "seconds_writing": round(self.seconds, 2),
            "tensors_read_back": len(self.digests),
        }


def write_and_read_back(
    folder: Path,
    outputs: Sequence[OutputTensor],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> WrittenTensors:
    """Write as `write_checkpoint` does, then read everything again.

    Raises:
        ConversionError: the pieces of a tensor do not fill it, or a tensor reads back differently.
    """
    started, digests = time.monotonic(), dict[str, str]()
    files = write_checkpoint(folder, outputs, max_shard_bytes=max_shard_bytes, progress=progress, digests=digests)
    seconds = time.monotonic() - started
    require_digests(Checkpoint(folder), digests, progress)
    return WrittenTensors(files, digests, seconds)


def require_digests(written: Checkpoint, digests: Mapping[str, str], progress: bool = True) -> None:
    """Read tensors of safetensors files and compare them with the digests of what was written.

    Raises:
        ConversionError: a tensor is missing, or reads back differently.
    """
    infos = {name: written.tensors.get(name) for name in digests}
    total = sum(info.num_bytes for info in infos.values() if info is not None)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Reading back", disable=not progress) as bar:
        for name, info in infos.items():
            digest = hashlib.sha256()
            if info is not None:
                with open(info.file, "rb") as file:
                    file.seek(info.start)
                    left = info.num_bytes
                    while left and (block := file.read(min(_BLOCK, left))):
                        digest.update(block)
                        left -= len(block)
                        bar.update(len(block))
            if digest.hexdigest() != digests[name]:
                raise ConversionError(f"{name} reads back differently from what was written: check the disk.")


def save_bin(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save tensors as `torch.save` does, and read them back. Raises ConversionError as `require_equal_file`."""
    torch.save(tensors, path)
    require_equal_file(path, tensors)


def require_equal_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read a safetensors or .bin file of tensors and compare it with what was saved into it.

    Raises:
        ConversionError: a tensor is missing, or reads back differently.
    """
    written = TensorFile(path)
    for name, tensor in tensors.items():
        read = written.read(name) if name in written.tensors else tensor.new_empty(0)
        same_kind = read.dtype == tensor.dtype and read.shape == tensor.shape
        # As bytes, so that NaNs are equal to themselves.
        if not same_kind or not torch.equal(_as_bytes(read), _as_bytes(tensor)):
            raise ConversionError(f"{path.name}: {name} reads back differently from what was written: check the disk.")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


__all__ = ["WrittenTensors", "require_digests", "require_equal_file", "save_bin", "write_and_read_back"]
