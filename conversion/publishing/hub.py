"""The Hub bundle: a folder that loads with `trust_remote_code=True` where unimoe is not installed.

Beside weights, configuration and processor it holds flat copies of every file of modeling_unimoe/ and processing/;
`auto_map` entries tell transformers' Auto classes which class is in which file.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import AUTO_MAP, UniMoeConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..checkpoints.checkpoint_reader import read_json
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.parameters import count_parameters
from .model_card import model_card

_PACKAGE = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("modeling_unimoe", "processing")
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_unimoe.UniMoeProcessor"}


def save_bundle(
    model: UniMoeForCausalLM | None, processor: Any | None, folder: str | Path, card: str | None = None
) -> Path:
    """Save a model and its processor as one folder, code and model card included.

    The folder appears, or takes the place of an older one, when all of it is written.

    Args:
        model: None for a folder without model.
        processor: a `UniMoeProcessor`, or the tokenizer of a text-only model, or None.
        card: text of README.md; None writes one from the configuration.
    """
    folder = Path(folder)
    with finished_folder(folder, replace=True) as new:
        if model is not None:
            model.save_pretrained(new)
        if processor is not None:
            processor.save_pretrained(new)
        if card is None and model is not None:
            card = model_card(folder.name, model.config, count_parameters(model.config))
        complete_bundle(new, card)
    return folder


def complete_bundle(folder: Path, card: str | None = None) -> None:
    """Add the code, the `auto_map` entries and the card to a folder that holds configurations."""
    write_code(folder)
    _set_auto_map(folder / "config.json", AUTO_MAP)
    _set_auto_map(folder / "processor_config.json", PROCESSOR_AUTO_MAP)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def push_folder(folder: Path, repository: str) -> str:
    """Upload a finished folder to a model repository on the Hub, made if it is not there; returns its address.

    Raises:
        ConversionError: the Hub refuses; the folder stays where it is.
    """
    from huggingface_hub import HfApi

    # HTTPError is that of the HTTP library that it happens to use; without a network it is not wrapped.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    except (OSError, HTTPError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"{folder} is complete but could not be uploaded to {repository!r} ({reason}). Log in with `hf auth login` if "
            f"you have not, and push it again with `hf upload {repository} {folder}`."
        ) from error
    return str(address)


def write_code(folder: Path) -> list[str]:
    """Copy the Hub-bound source files, flat; returns their names."""
    names = []
    for source in code_files():
        shutil.copyfile(source, folder / source.name)
        names.append(source.name)
    return names


def code_files() -> list[Path]:
    """The source files that travel with a model."""
    folders = [_PACKAGE / name for name in CODE_FOLDERS]
    return sorted(path for folder in folders for path in folder.glob("*.py") if path.name != "__init__.py")


def save_config(config: UniMoeConfig, folder: Path) -> None:
    """Write config.json as a saved `UniMoeForCausalLM` has it."""
    config.architectures = [UniMoeForCausalLM.__name__]
    config.save_pretrained(folder)


def _set_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    if path.is_file():
        content = read_json(path) | {"auto_map": auto_map}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
