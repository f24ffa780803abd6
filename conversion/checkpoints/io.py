"""Checkpoint folders, read and written one tensor at a time.

A reader looks at the headers only and reads each tensor's bytes when it is asked for, so that memory holds one tensor
and never a shard. A writer knows every shape beforehand, writes the headers first and then the tensors' pieces as they
come. What is read may come from strangers: an index may only name plain files of its own folder, every offset is
checked against the file, and pickled files are opened with `weights_only=True` alone.
"""

import hashlib
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ...errors import ConversionError

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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
DEFAULT_SHARD_BYTES = 4 << 30
_BLOCK = 1 << 20  # values that are written at once
_LFS_POINTER = b"version https://git-lfs"
# What torch.load raises on pickles that are damaged, too old to be mapped, or hold code.
UNPICKLING_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError)

T = TypeVar("T")


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


class Checkpoint:
    """The tensors of a folder with safetensors files (or, failing these, pickled ones that hold nothing but tensors).

    Raises:
        ConversionError: there are no weights, or a file is missing, truncated, or not what its index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pickle: tuple[Path, dict[str, torch.Tensor]] | None = None
        self.tensors = self._read_headers()
        self.files = sorted({info.file for info in self.tensors.values()})

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
        info = self.tensors[name]
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


def _is_plain(name: Any, tensor: Any) -> bool:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return False
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPE_NAMES


def dtype_name(dtype: torch.dtype | str) -> str:
    """As configurations write it, "bfloat16"; a name stays one."""
    return str(dtype).removeprefix("torch.")


def plain_file_name(name: Any, index: Path) -> str:
    """The name itself if it is that of a file directly in the folder; anything else is refused."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
    if not plain or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
        raise ConversionError(f"{index} points to {name!r}; only plain names of files beside it are allowed.")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConversionError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing: the folder is not complete. Fetch the file.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} cannot be read as JSON ({error}). Fetch the file again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} does not hold a JSON object. Fetch the file again.")
    return content


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
        entry = {"dtype": _DTYPE_NAMES[output.dtype], "shape": list(output.shape)}
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
