"""The tokenizer that lies in a model's folder."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import ERROR
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ...errors import ConversionError
from ..checkpoints.meta_model import first_line

SENTENCEPIECE = "tokenizer.model"
VOCABULARIES = (SENTENCEPIECE, "tokenizer.json")
_WORDS = "vocab.json"  # of tokenizers from before tokenizer.json, beside their merges


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, as it is; None where there is none.

    Raises:
        ConversionError: its files are damaged, or a package that reads them is missing.
    """
    if not any((folder / name).is_file() for name in (*VOCABULARIES, _WORDS)):
        return None
    require_sentencepiece(folder)
    try:
        with _without_remarks_on_the_config():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConversionError(f"The tokenizer in {folder} cannot be read ({first_line(error)}).") from error


def tokenizer_if_readable(folder: Path) -> PreTrainedTokenizerBase | None:
    """As `read_tokenizer`; None also for one that is damaged, or whose library is missing."""
    try:
        return read_tokenizer(folder)
    except ConversionError:
        return None


@contextmanager
def _without_remarks_on_the_config() -> Iterator[None]:
    """transformers looks at config.json as well, and remarks on fields and a model type that it does not know."""
    log = logging.get_logger("transformers.configuration_utils")
    before = log.level
    log.setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rope_scaling.*", category=FutureWarning)
            yield
    finally:
        log.setLevel(before)


def require_sentencepiece(folder: Path) -> None:
    """Without these packages transformers would make another tokenizer of a SentencePiece model, with a warning only."""
    if not (folder / SENTENCEPIECE).is_file() or (folder / "tokenizer.json").is_file():
        return
    if all(map(_is_installed, ("sentencepiece", "google.protobuf"))):
        return
    raise ConversionError(
        f"Reading {folder / 'tokenizer.model'} needs sentencepiece and protobuf: pip install 'unimoe[convert]'."
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


__all__ = ["SENTENCEPIECE", "VOCABULARIES", "read_tokenizer", "require_sentencepiece", "tokenizer_if_readable"]
