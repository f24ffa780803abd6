"""Tensors in a folder's safetensors or pickled files, read one at a time, whole or in part.

Headers are read at once and each tensor's bytes when it is asked for, so that memory holds one tensor and never a
shard. Files may come from strangers: an index may only name plain files of its own folder, and every offset is checked
against the file.
"""

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from ...errors import ConversionError
from ...model_folder import read_json
from .bitsandbytes_tensors import held_in_few_bits, read_held
from .pickle_files import load_pickle, refuse_truncated

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: its file, and for safetensors the byte range inside it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a folder with safetensors files (or, failing these, pickled ones that hold nothing but tensors).

    Weights that bitsandbytes saved in 4 or 8 bits (`in_few_bits`) look like all others: they have the shape and dtype that
    they had before, and what was stored beside them is not seen.

    Raises:
        ConversionError: there are no weights, or a file is missing, truncated, or not what its index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pickle: tuple[Path, dict[str, torch.Tensor]] | None = None
        self._stored = self._read_headers()
        self.in_few_bits = held_in_few_bits(self._stored, self._read_stored)
        beside = {name for held in self.in_few_bits.values() for name in held.companions}
        self.tensors = {
            name: replace(info, dtype=self.in_few_bits[name].dtype, shape=self.in_few_bits[name].shape)
            if name in self.in_few_bits
            else info
            for name, info in self._stored.items()
            if name not in beside
        }
        self.files = sorted({info.file for info in self._stored.values()})

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most floating point bytes; float32 where there are none."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of its own memory, on the CPU."""
        info = self.tensors[name]
        return self.read_flat(name, 0, math.prod(info.shape)).view(info.shape)

    def read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        """`count` values of a tensor from the `start`-th on, in row-major order."""
        if name in self.in_few_bits:
            return read_held(self.in_few_bits[name], start, count, self._read_stored)
        return self._read_stored(name, start, count)

    def _read_stored(self, name: str, start: int, count: int) -> torch.Tensor:
        info = self._stored[name]
        if info.file.suffix != ".safetensors":
            return self._unpickled(info.file)[name].reshape(-1)[start : start + count].clone()
        flat = torch.empty(count, dtype=info.dtype)
        buffer = flat.view(torch.uint8).numpy().data
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.start + start * info.dtype.itemsize)
            if file.readinto(buffer) != len(buffer):
                raise ConversionError(f"{info.file} ends inside {name}: fetch the file again.")
        return flat

    def _read_headers(self) -> dict[str, TensorInfo]:
        for whole, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
            if (self.folder / index).is_file():
                return self._read_index(self.folder / index)
            if (self.folder / whole).is_file():
                return self._tensors_of(self.folder / whole)
        shards = sorted(path.name for path in self.folder.glob("*-of-*.*") if path.suffix in (".bin", ".safetensors"))
        if shards:
            index = SAFETENSORS_INDEX if shards[0].endswith(".safetensors") else PICKLE_INDEX
            raise ConversionError(
                f"{self.folder} holds {shards[0]} but not {index}, which lists all shards. Fetch it."
            )
        raise ConversionError(
            f"{self.folder} holds no {SAFETENSORS}, {SAFETENSORS_INDEX} or {PICKLE}. Give a folder with weights."
        )

    def _read_index(self, index: Path) -> dict[str, TensorInfo]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index} has no weight_map. Fetch the file again.")
        wanted: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            wanted.setdefault(plain_file_name(file, index), []).append(name)
        tensors: dict[str, TensorInfo] = {}
        for file, names in wanted.items():
            path = self.folder / file
            if not path.is_file():
                raise ConversionError(f"{path} is missing, but {index.name} names it. Fetch the file.")
            inside = self._tensors_of(path)
            absent = sorted(set(names) - set(inside))
            if absent:
                raise ConversionError(f"{path} lacks {absent[0]}, which {index.name} places there. Fetch both again.")
            # Also what the index does not name: it must not get lost without a word.
            tensors |= {name: info for name, info in inside.items() if weight_map.get(name, file) == file}
        return tensors

    def _tensors_of(self, path: Path) -> dict[str, TensorInfo]:
        if path.suffix == ".safetensors":
            return _safetensors_header(path)
        return {name: TensorInfo(path, t.dtype, tuple(t.shape)) for name, t in self._unpickled(path).items()}

    def _unpickled(self, path: Path) -> dict[str, torch.Tensor]:
        """The content of a .bin file, mapped rather than read; the last file stays open."""
        if self._pickle is None or self._pickle[0] != path:
            self._pickle = None  # unmaps the file that was open
            content = load_pickle(path)
            if not isinstance(content, dict) or not all(_is_plain(*item) for item in content.items()):
                raise ConversionError(
                    f"{path} holds more than named, dense tensors of real numbers. Give the weights as safetensors."
                )
            self._pickle = (path, content)
        return self._pickle[1]


class TensorFile(Checkpoint):
    """The tensors of one safetensors or .bin file. Raises ConversionError as `Checkpoint`, and when it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path.parent)

    def _read_headers(self) -> dict[str, TensorInfo]:
        if not self.path.is_file():
            raise ConversionError(f"{self.path} is missing. Fetch the file.")
        return self._tensors_of(self.path)


def quantisation_notes(checkpoint: Checkpoint, label: str) -> list[str]:
    """For receipts: how many weights bitsandbytes had made smaller."""
    kinds = Counter(held.kind for held in checkpoint.in_few_bits.values())
    return [
        f"{count} weights of the {label} were held in {kind} by bitsandbytes: what was brought back has its rounding"
        for kind, count in sorted(kinds.items())
    ]


def _is_plain(name: Any, tensor: Any) -> bool:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return False
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPE_NAMES


def dtype_name(dtype: torch.dtype | str) -> str:
    """As configurations write it, "bfloat16"; a name stays one."""
    return str(dtype).removeprefix("torch.")


def plain_file_name(name: Any, index: Path) -> str:
    """The name itself if it is that of a file directly in the folder; anything else is refused."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
    if not plain or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
        raise ConversionError(f"{index} points to {name!r}; only plain names of files beside it are allowed.")
    return name


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    refuse_truncated(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise ConversionError(f"{path} is no complete safetensors file ({size} bytes). Fetch it again.")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            tensors = {name: _tensor_info(path, entry, 8 + length) for name, entry in entries.items()}
            ends = [entry["data_offsets"][1] for entry in entries.values()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConversionError(f"{path} has a damaged safetensors header ({error!r}). Fetch it again.") from error
    if 8 + length + max(ends, default=0) != size:
        raise ConversionError(
            f"{path} has {size} bytes but its header describes {8 + length + max(ends, default=0)}: "
            "it is truncated or damaged. Fetch it again."
        )
    return tensors


def _tensor_info(path: Path, entry: dict[str, Any], data_start: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (start, end, *entry["shape"])):
        raise ValueError(f"offsets {start}, {end} or shape {entry['shape']} are not natural numbers")
    info = TensorInfo(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), data_start + start)
    if end - start != info.num_bytes:
        raise ValueError(f"{end - start} bytes for shape {entry['shape']} of {entry['dtype']}")
    return info
