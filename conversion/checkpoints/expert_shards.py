"""Loading for expert parallelism from files by rank: a rank opens its own experts' files and the shared ones only.

transformers opens every file of an index on every rank, and then reads what the rank needs. Here tensors of experts are
handed to it closed: their shapes are known, and a file is opened when the first tensor in it is asked for, which only
happens on the ranks that own it.
"""

import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from ...errors import ConversionError
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from .checkpoint_reader import SAFETENSORS_INDEX, plain_file_name, read_json
from .layouts import experts_by_file
from .our_folder import read_our_config


def load_expert_parallel(folder: str | Path, distributed_config: Any, **options: Any) -> UniMoeForCausalLM:
    """Load a model that `unimoe convert layouts --ep` wrote, inside an initialised process group.

    Args:
        distributed_config: transformers' `DistributedConfig` with its `ep_size`; it need not be the number of ranks that
            the files were written for.
        options: further arguments of `from_pretrained`, e.g. dtype.

    Raises:
        ConversionError: the folder has no index, or its experts are not in files of their own.
    """
    folder = Path(folder)
    tensors = closed_tensors(folder)
    config = read_our_config(folder)
    model = UniMoeForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, distributed_config=distributed_config, **options
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def closed_tensors(folder: Path) -> dict[str, "ClosedTensor"]:
    """Every tensor of the folder's index; no file that holds experts alone is open yet."""
    index = folder / SAFETENSORS_INDEX
    if not index.is_file():
        raise ConversionError(f"{folder} has no {SAFETENSORS_INDEX}: write it with `unimoe convert layouts --ep N`.")
    weight_map = read_json(index).get("weight_map") or {}
    owners = experts_by_file(weight_map)
    if not any(owners.values()):
        raise ConversionError(
            f"{folder} keeps its experts together with other tensors: write it with `unimoe convert layouts --ep N`."
        )
    files = {file: LazyFile(folder / plain_file_name(file, index)) for file in owners}
    text = read_our_config(folder).text_config
    inner, hidden = text.moe_intermediate_size, text.hidden_size
    tensors = {}
    for name, file in weight_map.items():
        shape: tuple[int, ...] | None = None
        if owners[file] is not None:
            shape = (hidden, inner) if name.endswith(".down_proj.weight") else (inner, hidden)
        tensors[name] = ClosedTensor(files[file], name, shape)
    return tensors


class LazyFile:
    """A safetensors file that is opened when it is first read. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: Any = None
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        return self._open is not None

    def slice(self, name: str) -> Any:
        with self._lock:
            if self._open is None:
                if not self.path.is_file():
                    raise ConversionError(f"{self.path} is missing, and this rank needs it. Fetch the file.")
                self._open = safe_open(self.path, framework="pt")
            return self._open.get_slice(name)


class ClosedTensor:
    """A tensor in a file, as transformers' loader wants it: a shape, and values on demand.

    Args:
        shape: None takes it from the file, which opens it.
    """

    def __init__(self, file: LazyFile, name: str, shape: tuple[int, ...] | None) -> None:
        self.file, self.name, self._shape = file, name, shape

    def get_shape(self) -> list[int]:
        return list(self._shape) if self._shape is not None else self.file.slice(self.name).get_shape()

    def get_dtype(self) -> str:
        return self.file.slice(self.name).get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.file.slice(self.name)[index]


__all__ = ["ClosedTensor", "LazyFile", "closed_tensors", "load_expert_parallel"]
