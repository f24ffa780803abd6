"""Tensors written as safetensors: shards, their index and their digests.

Every shape is known beforehand, so headers come first and then the tensors' pieces as they are made.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ...errors import ConversionError
from .checkpoint_reader import DTYPE_NAMES, SAFETENSORS, SAFETENSORS_INDEX, dtype_name

DEFAULT_SHARD_BYTES = 4 << 30
_BLOCK = 1 << 20  # values that are written at once

T = TypeVar("T")


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: the pieces, made when they are needed, follow each other in its memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Callable[[], torch.Tensor], ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    outputs: Iterable[OutputTensor],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
    digests: dict[str, str] | None = None,
) -> list[Path]:
    """Write safetensors shards and, when there are several, their index into an existing folder; returns the shards.

    `digests` receives the SHA-256 of every tensor's bytes by its name.

    Raises:
        ConversionError: the pieces of a tensor do not fill it.
    """
    shards = split_into_shards(outputs, lambda output: output.num_bytes, max_shard_bytes)
    names = shard_names(SAFETENSORS, len(shards))
    return write_shards(folder, dict(zip(names, shards, strict=True)), progress=progress, digests=digests)


def write_shards(
    folder: Path,
    shards: Mapping[str, list[OutputTensor]],
    *,
    progress: bool = True,
    digests: dict[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write files of these names and tensors, and their index unless there is one file alone.

    `metadata` goes into the index; for the rest see `write_checkpoint`.
    """
    total = sum(output.num_bytes for shard in shards.values() for output in shard)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing", disable=not progress) as bar:
        for name, shard in shards.items():
            _write_shard(folder / name, shard, bar.update, digests)
    if len(shards) > 1:
        weight_map = {output.name: name for name, shard in shards.items() for output in shard}
        index = {"metadata": {"total_size": total, **(metadata or {})}, "weight_map": weight_map}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in shards]


def split_into_shards(tensors: Iterable[T], num_bytes: Callable[[T], int], max_shard_bytes: int) -> list[list[T]]:
    """The tensors in order, cut where a shard would become too big; a tensor that is too big by itself has its own."""
    shards: list[list[T]] = [[]]
    filled = 0
    for tensor in tensors:
        size = num_bytes(tensor)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def shard_names(whole: str, count: int) -> list[str]:
    """File names of shards, by that of the file that holds everything: model-00001-of-00002.safetensors, ..."""
    stem, _, suffix = whole.rpartition(".")
    return [whole] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)]


def _write_shard(
    path: Path, outputs: list[OutputTensor], wrote: Callable[[int], Any], digests: dict[str, str] | None
) -> None:
    # Wide types first keeps every tensor aligned to its own size without holes, which the format forbids.
    outputs = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        entry = {"dtype": DTYPE_NAMES[output.dtype], "shape": list(output.shape)}
        header[output.name] = entry | {"data_offsets": [offset, offset + output.num_bytes]}
        offset += output.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for output in outputs:
            written, digest = 0, hashlib.sha256()
            for piece in _bytes_of(output):
                file.write(piece)
                if digests is not None:
                    digest.update(piece)
                written += len(piece)
                wrote(len(piece))
            if written != output.num_bytes:
                raise ConversionError(f"{output.name} got {written} bytes; its shape needs {output.num_bytes}.")
            if digests is not None:
                digests[output.name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(output: OutputTensor) -> Iterator[memoryview]:
    for make in output.pieces:
        # Block by block, so that a conversion of the dtype makes no second tensor of the whole size.
        for block in make().detach().cpu().contiguous().reshape(-1).split(_BLOCK):
            made = block.to(output.dtype)
            if made.is_floating_point() and not made.isfinite().all():
                raise ConversionError(
                    f"{output.name} holds values that are no finite numbers in {dtype_name(output.dtype)}: choose a "
                    "dtype of a wider range, or fetch the source again."
                )
            yield made.view(torch.uint8).numpy().data
