"""The tokenizer files of the original, carried along unread and given back by the export.

What transformers 5 saves (`TokenizersBackend` in tokenizer.json) the original's code, of transformers 4.31, cannot load:
it wants the SentencePiece model and the configuration that names LlamaTokenizer.
"""

import shutil
from pathlib import Path

from ...errors import ConversionError
from ..dense.tokenizer_files import SENTENCEPIECE, VOCABULARIES

CARRIED = "original_tokenizer"
_FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tokenizer_folder(*folders: Path | None) -> Path | None:
    """The first folder that holds a tokenizer."""
    for folder in folders:
        if folder is not None and any((folder / name).is_file() for name in VOCABULARIES):
            return folder
    return None


def carry_tokenizer(source: Path, target: Path) -> None:
    """Copy the original's tokenizer files, as they are, into a folder of their own inside the target."""
    _copy(source, target / CARRIED)


def give_back_tokenizer(model: Path, base: Path, given: Path | None) -> list[str]:
    """Copy into `base` the tokenizer that the original loads; returns lines for a reader.

    Args:
        model: our folder; what it carries is taken, else its own tokenizer, which the original cannot load.
        given: the folder whose tokenizer to take in its place.

    Raises:
        ConversionError: `given` has no tokenizer.model.
    """
    if given is not None and not (given / SENTENCEPIECE).is_file():
        raise ConversionError(
            f"{given / SENTENCEPIECE} is missing: give the folder of the base model that this one was made from."
        )
    source = given or model / CARRIED
    if source.is_dir():
        return [f"base: {', '.join(_copy(source, base))} of the original"]
    ours = sorted(model.glob("tokenizer*"))
    for path in ours:
        shutil.copyfile(path, base / path.name)
    what = "the tokenizer in base is of our format" if ours else "base has no tokenizer"
    return [
        f"note: {what}; the original's code needs tokenizer.model and tokenizer_config.json. "
        "Export again with --tokenizer BASE, the original's base folder, or copy them from there."
    ]


def _copy(source: Path, target: Path) -> list[str]:
    target.mkdir(exist_ok=True)
    names = [name for name in _FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
