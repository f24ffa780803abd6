"""Opens models to use them: the folder is checked, processor and model are loaded, on a device and perhaps in few bits."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from .conversion.checkpoints.checkpoint_reader import Checkpoint
from .conversion.checkpoints.our_folder import read_our_config
from .errors import CheckpointError, ConfigurationError, UniMoeError
from .hub_access import MODEL_FILES
from .model_folder import read_json, resolve_folder
from .modeling_unimoe.configuration_unimoe import UniMoeConfig
from .progress_bars import transformers_bars
from .quantization import quantization_config

# JSON files that must be objects where they exist.
_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def open_model(name: str, device: Any = None, quantize: str | None = None, others: bool = False) -> tuple[Any, Any]:
    """The processor and the model of a folder or Hub id.

    Args:
        device: a torch.device or its name; cuda where there is one, else cpu, for None.
        quantize: "int8" or "int4", see `quantization_config`; only for models of ours.
        others: take any causal language model too; it comes with its tokenizer.

    Raises:
        ConversionError: there is no such folder or Hub repository, it holds another kind of model, or a file of it is
            missing or damaged.
        CheckpointError: its tokenizer is missing, its files do not go together, or it is quantised already.
        ConfigurationError: `quantize` is something else, or another kind of model is to be quantised.
        MissingPackageError: the library that quantises is not installed.
        UniMoeError: the device is not there.
    """
    place = _usable_device(device)
    with transformers_bars(shown=False):
        folder = resolve_folder(name, MODEL_FILES)
        if others and read_json(folder / "config.json").get("model_type") != UniMoeConfig.model_type:
            return _load_other(folder, place, quantize)
        check_folder(folder)
        return _load(folder, place, quantize)


def _usable_device(device: Any) -> torch.device:
    """The device once it has computed something; cuda or cpu for None."""
    name = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
        torch.zeros(1, device=place).add(1).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:  # which one depends on the kind of device
        reason = str(error).partition("\n")[0]
        raise UniMoeError(
            f"--device is {str(name)!r}, which cannot be used here ({reason}): use cpu, or leave the option out."
        ) from error
    return place


def check_folder(folder: Path) -> None:
    """What transformers would answer with a traceback: files that are missing, truncated or not what they should be.

    Raises:
        ConversionError: there is no model of ours in the folder, or a file of it is missing or damaged.
        CheckpointError: its tokenizer is missing or none.
    """
    read_our_config(folder)
    Checkpoint(folder)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no {_TOKENIZER_FILES[0]}: if it was converted, convert again with the tokenizer's files beside "
            "the original config.json; else save the processor into it (processor.save_pretrained)."
        )
    contents = {file: read_json(folder / file) for file in _JSON_FILES if (folder / file).is_file()}
    if not isinstance(contents.get("tokenizer.json", {"model": {}}).get("model"), dict):
        raise CheckpointError(f"{folder / 'tokenizer.json'} has no model of a tokenizer in it: fetch the file again.")


def _load(folder: Path, device: torch.device, quantize: str | None) -> tuple[Any, Any]:
    """Processor and model. What transformers raises here means that the files do not go together, or do not fit in."""
    options = _quantized_options(folder, device, quantize)
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"The processor in {folder} cannot be loaded ({error}): save it again, with its tokenizer."
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()
        return processor, model if options else model.to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The model in {folder} cannot be loaded on {device}: {error}") from error


def _quantized_options(folder: Path, device: torch.device, quantize: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs to know if weights are, or shall be, held in few bits: it brings them to the device."""
    saved = read_json(folder / "config.json").get("quantization_config")
    if quantize is None:
        return {} if saved is None else {"device_map": {"": device}}
    require_unquantised(folder)
    return {"device_map": {"": device}, "quantization_config": quantization_config(quantize)}


def require_unquantised(folder: Path) -> None:
    """Raises CheckpointError if the folder's weights are held in few bits already."""
    if read_json(folder / "config.json").get("quantization_config") is not None:
        raise CheckpointError(f"{folder} was saved with quantised weights: leave out --quantize.")


def _load_other(folder: Path, device: torch.device, quantize: str | None) -> tuple[Any, Any]:
    if quantize is not None:
        raise ConfigurationError(
            f"{folder} holds no model of ours, and only these can be quantised: leave out --quantize."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)
        return AutoTokenizer.from_pretrained(folder), model
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The model in {folder} cannot be loaded ({error}): check the folder.") from error


__all__ = ["check_folder", "open_model", "require_unquantised"]
