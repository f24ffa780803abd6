"""A pretrained vision model of transformers: where it is, what names it, and the model itself once it is needed."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...hub_access import hub_snapshot
from ...package_errors import PartError
from ..media_policy_unimoe import OptionError

# Of a weight file so many pieces of this size are read for its digest, evenly over it, and all of a smaller one.
_PIECES, _PIECE_BYTES = 64, 1 << 16
_READ = ("*.json", "*.safetensors", "*.txt", "*.model")


class Pretrained:
    """A model and its processor, by Hub id or folder, loaded when they are first asked for.

    Args:
        name: Hub id, of which safetensors are fetched and never pickles, or a folder.
        device: e.g. "cpu", "cuda:1".
        dtype: of weights and inputs: "float32", "bfloat16", "float16".

    Raises:
        OptionError: no such device or dtype; a GPU that is not there, when the model is first asked for.
        PartError: the folder or the model on the Hub is not there, when it is first asked for.
    """

    def __init__(self, name: str | Path, device: str = "cpu", dtype: str = "float32") -> None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise OptionError(f"{dtype!r} is no dtype for a vision model; use float32, bfloat16 or float16.")
        self.name = str(name)
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise OptionError(f"{device!r} is no device; use cpu, cuda or cuda:1.") from error
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._folder: Path | None = None
        self._config: Any = None
        self._model: Any = None
        self._processors: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """Name, digest of the files and dtype; the device is not part of it."""
        return {"model": Path(self.name).name, "digest": folder_digest(self.folder), "dtype": str(self.dtype)[6:]}

    @property
    def folder(self) -> Path:
        """The folder of its files, fetched if need be."""
        if self._folder is None:
            self._folder = Path(self.name) if Path(self.name).is_dir() else hub_snapshot(self.name)
        return self._folder

    @property
    def config(self) -> Any:
        """Its configuration."""
        if self._config is None:
            from transformers import AutoConfig

            self._config = self._from_folder(AutoConfig.from_pretrained)
        return self._config

    def model(self, auto_class: Any) -> Any:
        """The model by an Auto class of transformers, or another class with `from_pretrained`."""
        if self._model is None:
            if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
                raise OptionError(f"{self.device} is not there: this machine has {torch.cuda.device_count()} GPUs.")
            model = self._from_folder(lambda folder: auto_class.from_pretrained(folder, dtype=self.dtype))
            self._model = model.to(self.device).eval()
        return self._model

    def processor(self, auto_class: Any) -> Any:
        """Its processor or image processor by an Auto class."""
        name = auto_class.__name__
        if name not in self._processors:
            self._processors[name] = self._from_folder(auto_class.from_pretrained)
        return self._processors[name]

    def on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Tensors where the model is, floating point ones in its dtype."""
        moved = {name: value.to(self.device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in moved.items()}

    def _from_folder(self, load: Callable[[Path], Any]) -> Any:
        try:
            return load(self.folder)
        except ImportError as error:
            raise PartError(
                f"{self.name} cannot be loaded as a vision model ({' '.join(str(error).split())}). Install what is missing; "
                "image processors of transformers 5.23 need no torchvision."
            ) from error
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PartError(f"{self.name} cannot be loaded as a vision model ({reason}).") from error


def accepted(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that a function takes: post-processing of model families differs in them."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def in_float32(outputs: Any) -> Any:
    """Model outputs with their half precision tensors in float32, for post-processing; the same object."""
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs[name] = value.float()
    return outputs


def folder_digest(folder: Path) -> str:
    """A name of what is in a model folder: all of small files, samples of large ones."""
    digest = hashlib.sha256()
    files = sorted(path for pattern in _READ for path in folder.glob(pattern))
    if not files:
        raise PartError(f"{folder} holds no model: name a folder with config.json and model.safetensors, or a Hub id.")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_PIECE_BYTES, size // _PIECES)):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()[:32]


def batches(items: Any, size: int) -> list[Any]:
    """Slices of a sequence, each of so many items but the last."""
    return [items[start : start + size] for start in range(0, len(items), size)]
