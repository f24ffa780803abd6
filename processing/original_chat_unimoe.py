"""How the original Uni-MoE code turns a prompt into token ids and labels, for exact comparison with it.

`ChatEncoder` keeps texts from acting as control tokens and learns exactly the answers. The original does neither: an
end-of-turn token inside a message splits it, and labels are found by splitting the prompt again and counting tokens.
Where the counts do not add up the whole sample is given up.
"""

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .chat_unimoe import AUDIO_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN, ChatEncoder, EncodedChat

logger = logging.get_logger(__name__)

TOKENIZATIONS = ("plain", "spaced", "original")
_PLACEHOLDERS = re.compile(f"({IMAGE_TOKEN}|{AUDIO_TOKEN}|{VIDEO_TOKEN})")
_END_OF_TURN = "</s>"
_BEFORE_ANSWER = " ASSISTANT: "


def build_encoder(tokenizer: PreTrainedTokenizerBase, template: str, tokenization: str) -> ChatEncoder:
    """The encoder for one of `TOKENIZATIONS`.

    "plain" and "spaced" are `ChatEncoder` without and with `spaced`; "original" is `OriginalChatEncoder`.
    """
    if tokenization == "original":
        return OriginalChatEncoder(tokenizer, template)
    return ChatEncoder(tokenizer, template, spaced=tokenization == "spaced")


class OriginalChatEncoder(ChatEncoder):
    """The original's rules, faults included; for SentencePiece tokenizers and `VICUNA_CHAT_TEMPLATE` only.

    Only placeholders written in a text stay text, as in the original's samples without media.
    """

    def encode(self, messages: list[dict[str, Any]], **options: Any) -> EncodedChat:
        """Render and encode. Where the counts do not add up no token is an answer, and a warning is logged."""
        mark = self._unused_mark([messages, options])
        prompt, _ = self.render(_replace_in_texts(messages, mark), **options)
        prompt = prompt.removeprefix(self.tokenizer.bos_token or "")
        input_ids = [self.tokenizer.bos_token_id, *self._encode_prompt(prompt, mark)]
        answer = [False] * len(input_ids)
        if options.get("add_generation_prompt"):
            return EncodedChat(input_ids, answer)
        padding = self.tokenizer.unk_token_id  # the original pads with the unknown token and counts the rest
        total = sum(token != padding for token in input_ids)
        position = 1
        for instruction, length in self._rounds(prompt, mark):
            for index in range(position + instruction, min(position + length, len(input_ids))):
                answer[index] = True
            position += length
        if position != total:
            logger.warning(f"Tokenisation mismatch: {position} vs. {total}; nothing of this sample is learned.")
            answer = [False] * len(input_ids)
        return EncodedChat(input_ids, answer)

    def _rounds(self, prompt: str, mark: str) -> Iterator[tuple[int, int]]:
        """Lengths of instruction and whole of each round, until one does not hold exactly one answer."""
        for text in prompt.split(_END_OF_TURN):
            instruction, separator, answer = text.partition(_BEFORE_ANSWER)
            if not text or not separator or _BEFORE_ANSWER in answer:
                return
            # Both lengths count the BOS; the first loses it and the space at its end again.
            yield (
                1 + len(self._encode_prompt(instruction + separator, mark)) - 2,
                1 + len(self._encode_prompt(text, mark)),
            )

    def _encode_prompt(self, prompt: str, mark: str) -> list[int]:
        """Ids without BOS: texts one by one, placeholders and the tokenizer's own special tokens between them."""
        tokenizer = self.tokenizer
        own = [token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) if token]
        pattern = re.compile(f"({'|'.join(map(re.escape, own))})|{_PLACEHOLDERS.pattern}")
        ids: list[int] = []
        for piece in filter(None, pattern.split(prompt)):
            if pattern.fullmatch(piece):
                ids.append(self.ids_of_control[piece])
            else:
                ids += self._encode_text(" " + piece.replace(mark, "<"))
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Ids of a text in which nothing acts as a control token; after a newline, see `ChatEncoder`."""
        ids = self.tokenizer.encode("\n" + text, add_special_tokens=False, split_special_tokens=True)
        return ids[len(self._newline) :]


def _replace_in_texts(value: Any, mark: str) -> Any:
    """Placeholders in texts begin with a mark in place of `<`."""
    if isinstance(value, str):
        return _PLACEHOLDERS.sub(lambda match: mark + match[0][1:], value)
    if isinstance(value, dict):
        return {key: _replace_in_texts(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_in_texts(item, mark) for item in value]
    return value
