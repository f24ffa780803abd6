"""Tokenizers that learn the placeholders of media, and those ids."""

from transformers import PreTrainedTokenizerBase

from ...processing.chat_templates_unimoe import BUNNY_SEPARATORS
from ...processing.chat_unimoe import MEDIA_TOKENS, prepare_tokenizer

# Names in the configuration's `{name}_token_id`, in the order of `MEDIA_TOKENS`.
PLACEHOLDERS = ("image", "video", "audio", "sound")


def placeholder_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the placeholder tokens, by `PLACEHOLDERS`."""
    ids = tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS))
    return dict(zip(PLACEHOLDERS, ids, strict=True))  # type: ignore[arg-type]


def prepare_bunny_tokenizer(tokenizer: PreTrainedTokenizerBase, version: str) -> PreTrainedTokenizerBase:
    """Give a tokenizer the placeholders, and the padding and end tokens that MoIIE's trainer gives it.

    With "llama" answers end, and rows are padded, with `<|end_of_text|>`; else rows are padded with the tokenizer's own
    token, with the unknown token where it has none, and with the end of text where it has neither.
    """
    if version == "llama":
        tokenizer.eos_token = tokenizer.pad_token = BUNNY_SEPARATORS[version][1]
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    prepare_tokenizer(tokenizer, chat_tokens=False)
    return tokenizer


__all__ = ["PLACEHOLDERS", "placeholder_ids", "prepare_bunny_tokenizer"]
