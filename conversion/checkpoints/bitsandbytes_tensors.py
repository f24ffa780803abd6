"""Weights that bitsandbytes saved in 4 or 8 bits, brought back value by value as they are read.

4 bits    `X.weight` holds two values to a byte, the first in the upper half; each is the index of a level in
          `X.weight.quant_map` [16]. A block's values are the levels times its `X.weight.absmax`, which may itself be held in 8
          bits: indices into `nested_quant_map` [256], times a `nested_absmax` for every block of them, plus an offset.
          `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) is a JSON object with shape, dtype and block sizes.
8 bits    `X.weight` is int8 [N, K]; row n is worth `X.SCB[n]` / 127 a step.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ConversionError

# Name, first value and number of values -> these, as they are stored.
ReadStored = Callable[[str, int, int], torch.Tensor]

_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
_TORCHAO = re.compile(r"(.+)\._(\w+)_qdata")
_NESTED = ("nested_absmax", "nested_quant_map")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CHUNK = 1 << 22  # values
_LONGEST_STATE = 1 << 16  # bytes
_ROW_FORMAT = 0  # of 8-bit weights; the other layouts were for kernels that are gone
# Last part of a tensor's name -> who made weights smaller in a way that is not read here.
_OTHERS = {
    "g_idx": "GPTQ",
    "qweight": "AWQ or GPTQ",
    "W_q": "HQQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or FP8",
    "weight_scale_inv": "FP8 in blocks",
    "_weight_qdata": "torchao",
    "_data": "Quanto",
    "absmax": "bitsandbytes, without its quant_state",
    "SCB": "bitsandbytes, without its int8 weight",
}


@dataclass(frozen=True)
class Blocks4:
    """A weight in 4 bits. Sizes are numbers of values; `nested_size` is that of blocks of absmax, 0 where they are plain."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    nested_size: int
    nested_offset: float
    item_size: int  # of the dtype that the bytes are stored as

    @property
    def companions(self) -> tuple[str, ...]:
        nested = _NESTED if self.nested_size else ()
        last = ("absmax", "quant_map", f"quant_state.bitsandbytes__{self.kind}", *nested)
        return tuple(f"{self.name}.{part}" for part in last)

    def values(self, start: int, count: int, stored: ReadStored) -> torch.Tensor:
        first, end = start // (2 * self.item_size), math.ceil((start + count) / (2 * self.item_size))
        halves = stored(self.name, first, end - first).view(torch.uint8)
        index = torch.stack((halves >> 4, halves & 0xF), dim=1).flatten()
        skipped = start - first * 2 * self.item_size
        index = index[skipped : skipped + count].int()
        levels = stored(f"{self.name}.quant_map", 0, 16).float()
        block = start // self.block_size
        absmax = self._absmax(block, math.ceil((start + count) / self.block_size) - block, stored)
        of_value = torch.arange(start, start + count).div_(self.block_size, rounding_mode="floor") - block
        return levels[index].mul_(absmax[of_value])

    def _absmax(self, block: int, count: int, stored: ReadStored) -> torch.Tensor:
        held = stored(f"{self.name}.absmax", block, count)
        if not self.nested_size:
            return held.float()
        first = block // self.nested_size
        outer = stored(f"{self.name}.nested_absmax", first, math.ceil((block + count) / self.nested_size) - first)
        of_block = torch.arange(block, block + count).div_(self.nested_size, rounding_mode="floor") - first
        levels = stored(f"{self.name}.nested_quant_map", 0, 256).float()
        return levels[held.int()].mul_(outer.float()[of_block]).add_(self.nested_offset)


@dataclass(frozen=True)
class Rows8:
    """A weight in 8 bits."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_format: bool
    kind: str = "int8"

    @property
    def companions(self) -> tuple[str, ...]:
        module = self.name.removesuffix(".weight")
        return (f"{module}.SCB", *([f"{module}.weight_format"] if self.has_format else []))

    def values(self, start: int, count: int, stored: ReadStored) -> torch.Tensor:
        width = self.shape[1]
        first = start // width
        scale = stored(self.companions[0], first, math.ceil((start + count) / width) - first).float() / 127
        of_value = torch.arange(start, start + count).div_(width, rounding_mode="floor") - first
        return stored(self.name, start, count).float().mul_(scale[of_value])


Held = Blocks4 | Rows8


def read_held(held: Held, start: int, count: int, stored: ReadStored) -> torch.Tensor:
    """`count` values of a weight from the `start`-th on, flat, in the dtype that it had; made piece by piece."""
    flat = torch.empty(count, dtype=held.dtype)
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        flat[first : first + size] = held.values(start + first, size, stored)
    return flat


def held_in_few_bits(infos: Mapping[str, Any], stored: ReadStored) -> dict[str, Held]:
    """The weights of a file or folder that bitsandbytes made smaller.

    Args:
        infos: name -> what is stored under it, with `dtype` and `shape`.

    Raises:
        ConversionError: what belongs to such a weight is missing, or does not fit it.
    """
    floats: dict[torch.dtype, int] = {}
    for name, info in infos.items():
        if info.dtype in _DTYPES.values() and not name.endswith((".SCB", "absmax", "quant_map")):
            floats[info.dtype] = floats.get(info.dtype, 0) + math.prod(info.shape)
    main = max(floats, key=lambda dtype: floats[dtype], default=torch.float16)
    found: dict[str, Held] = {}
    for name in infos:
        if match := _STATE.fullmatch(name):
            found[match["weight"]] = _blocks4(match["weight"], match["kind"], infos, stored)
        elif name.endswith(".SCB") and (weight := f"{name.removesuffix('.SCB')}.weight") in infos:
            found[weight] = _rows8(weight, main, infos, stored)
    return found


def refuse_other_quantisation(names: Iterable[str], where: str) -> None:
    """Raise a ConversionError if tensors were made smaller by something that is not read here; it says by what."""
    for name in names:
        last = name.rpartition(".")[2]
        if last in _OTHERS:
            raise ConversionError(
                f"{where} was quantised by {_OTHERS[last]} ({name}), which is not read here: give the weights in float32, "
                "float16 or bfloat16, or in 4 or 8 bits as bitsandbytes saves them."
            )


def held_by_torchao(names: Iterable[str]) -> set[str]:
    """The weights whose quantised values torchao put into a file, as `X._weight_qdata` for `X.weight`."""
    return {f"{match[1]}.{match[2]}" for name in names if (match := _TORCHAO.fullmatch(name))}


def _blocks4(name: str, kind: str, infos: Mapping[str, Any], stored: ReadStored) -> Blocks4:
    state_name = f"{name}.quant_state.bitsandbytes__{kind}"
    try:
        length = math.prod(infos[state_name].shape)
        if length > _LONGEST_STATE:
            raise ValueError(f"its quant_state has {length} bytes")
        state = json.loads(bytes(stored(state_name, 0, length).view(torch.uint8).tolist()))
        held = Blocks4(
            name,
            kind,
            tuple(state["shape"]),
            _DTYPES[state["dtype"]],
            state["blocksize"],
            state.get("nested_blocksize", 0),
            float(state.get("nested_offset", 0.0)),
            infos[name].dtype.itemsize,
        )
        sizes = (*held.shape, held.block_size, *([held.nested_size] if "nested_blocksize" in state else []))
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{sizes} are not all positive")
        count = math.prod(held.shape)
        blocks = math.ceil(count / held.block_size)
        wanted = {name: math.ceil(count / 2 / held.item_size), f"{name}.absmax": blocks, f"{name}.quant_map": 16}
        if held.nested_size:
            wanted |= {f"{name}.nested_absmax": math.ceil(blocks / held.nested_size), f"{name}.nested_quant_map": 256}
        _require_sizes(wanted, infos)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{name} was saved in 4 bits, but what belongs to it is damaged or missing ({error!r}): fetch the file again."
        ) from error
    return held


def _rows8(name: str, dtype: torch.dtype, infos: Mapping[str, Any], stored: ReadStored) -> Rows8:
    module = name.removesuffix(".weight")
    info = infos[name]
    held = Rows8(name, info.shape, dtype, f"{module}.weight_format" in infos)
    try:
        if info.dtype != torch.int8 or len(info.shape) != 2 or 0 in info.shape:
            raise ValueError(f"{info.dtype} of shape {list(info.shape)}, not int8 of two dimensions")
        _require_sizes({held.companions[0]: info.shape[0]}, infos)
        if held.has_format and int(stored(held.companions[1], 0, 1)) != _ROW_FORMAT:
            raise ValueError("its rows are in the order of an old kernel")
    except (ValueError, RuntimeError) as error:
        raise ConversionError(
            f"{name} was saved in 8 bits, but what belongs to it does not fit ({error}): fetch the file again."
        ) from error
    return held


def _require_sizes(wanted: Mapping[str, int], infos: Mapping[str, Any]) -> None:
    for name, count in wanted.items():
        if math.prod(infos[name].shape) != count:
            raise ValueError(f"{name} holds {math.prod(infos[name].shape)} values, not {count}")
