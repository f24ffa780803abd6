"""InternLM2's tokenizer as MoAI uses it, read from `tokenizer.model` without the code that its folder names.

The original is a slow tokenizer of SentencePiece: every stretch of text between special tokens gets a space in front,
also where it begins with one, and the marks of turns, such as `[UNUSED_TOKEN_146]`, are pieces inside such a stretch.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...errors import ConversionError
from ...processing.chat_unimoe import IMAGE_TOKEN
from ..dense.tokenizer_files import SENTENCEPIECE, require_sentencepiece

# Pieces that the model has for the turns of a conversation.
MARK_PATTERN = r"\[UNUSED_TOKEN_\d+\]"
END_OF_TURN, START_OF_TURN = "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"
_SPACE = "▁"


def read_moai_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a MoAI checkpoint, with `<image>` behind its vocabulary; None without `tokenizer.model`.

    Raises:
        ConversionError: the file is damaged, or a package that reads it is missing.
    """
    if not (folder / SENTENCEPIECE).is_file():
        return None
    require_sentencepiece(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(folder),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def _backend(folder: Path) -> Any:
    from tokenizers import Tokenizer

    with TemporaryDirectory() as scratch:
        # On its own: beside it lies a tokenizer_config.json that names code, which is not run.
        shutil.copyfile(folder / SENTENCEPIECE, Path(scratch) / SENTENCEPIECE)
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
        (Path(scratch) / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        try:
            read = AutoTokenizer.from_pretrained(scratch).backend_tokenizer
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise ConversionError(
                f"{folder / SENTENCEPIECE} cannot be read ({str(error).splitlines()[0]}). Fetch the file again."
            ) from error
    return Tokenizer.from_str(json.dumps(_as_slow(json.loads(read.to_str()))))


def _as_slow(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a fast tokenizer that gives the ids of the slow one."""
    normalizers = [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ]
    settings["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    settings["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": MARK_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    settings["model"]["ignore_merges"] = True  # a mark is a piece of its own, which no merges lead to
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["special"]]
    return settings


__all__ = ["END_OF_TURN", "MARK_PATTERN", "START_OF_TURN", "read_moai_tokenizer"]
