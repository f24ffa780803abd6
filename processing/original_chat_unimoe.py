"""How the original Uni-MoE and MoIIE code turns a prompt into token ids and labels, for exact comparison with it.

`ChatEncoder` keeps texts from acting as control tokens and learns exactly the answers. The originals do neither: an
end-of-turn token inside a message splits it, and labels are found by splitting the prompt again and counting tokens.
Where the counts do not add up the whole sample is given up.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .chat_templates_unimoe import BUNNY_SEPARATORS, BUNNY_VERSIONS, begins_with_bos
from .chat_unimoe import AUDIO_TOKEN, IMAGE_TOKEN, MEDIA_TOKENS, VIDEO_TOKEN, ChatEncoder, EncodedChat

logger = logging.get_logger(__name__)

_BUNNY = {f"original-{version}": version for version in BUNNY_VERSIONS}
TOKENIZATIONS = ("plain", "spaced", "original", *_BUNNY)
_PLACEHOLDERS = re.compile(f"({IMAGE_TOKEN}|{AUDIO_TOKEN}|{VIDEO_TOKEN})")


def build_encoder(tokenizer: PreTrainedTokenizerBase, template: str, tokenization: str) -> ChatEncoder:
    """The encoder for one of `TOKENIZATIONS`.

    "plain" and "spaced" are `ChatEncoder` without and with `spaced`; "original" is `OriginalUniMoeEncoder`; the others
    are `OriginalBunnyEncoder`, by the version of its template.
    """
    if tokenization == "original":
        return OriginalUniMoeEncoder(tokenizer, template)
    if tokenization in _BUNNY:
        return OriginalBunnyEncoder(tokenizer, template, _BUNNY[tokenization])
    return ChatEncoder(tokenizer, template, spaced=tokenization == "spaced")


def needs_answer(tokenization: str) -> bool:
    """Whether a sample of which nothing is learned is an error; the originals only warn."""
    return not tokenization.startswith("original")


class OriginalChatEncoder(ChatEncoder, ABC):
    """What the originals have in common, faults included: rounds of a question and an answer, found by splitting.

    Only placeholders written in a text stay text, as in the originals' samples without media.
    """

    end_of_answer: str
    before_answer: str

    def encode(self, messages: list[dict[str, Any]], **options: Any) -> EncodedChat:
        """Render and encode. Where the counts do not add up no token is an answer, and a warning is logged."""
        mark = self._unused_mark([messages, options])
        prompt, _ = self.render(_replace_in_texts(messages, mark), **options)
        prompt = prompt.removeprefix(self.tokenizer.bos_token or "")
        has_media = any(isinstance(message["content"], list) for message in messages)
        input_ids = self._encode_prompt(prompt, mark)
        if options.get("add_generation_prompt"):
            return EncodedChat(input_ids, [False] * len(input_ids))
        return self._with_answers(input_ids if has_media else self._cut(input_ids), prompt, mark)

    def _with_answers(self, input_ids: list[int], prompt: str, mark: str) -> EncodedChat:
        answer = [False] * len(input_ids)
        rounds = list(self._rounds(prompt, mark))
        position = self._first()
        for instruction, length in rounds:
            for index in range(position + instruction, min(position + length, len(input_ids))):
                answer[index] = True
            position += length
        expected, found = self._counts(position, len(rounds), input_ids)
        if expected != found:
            logger.warning(f"Tokenisation mismatch: {expected} vs. {found}; nothing of this sample is learned.")
            answer = [False] * len(input_ids)
        return EncodedChat(input_ids, answer)

    def _rounds(self, prompt: str, mark: str) -> Iterator[tuple[int, int]]:
        """Lengths of instruction and whole of each round, until one does not hold exactly one answer."""
        for text in prompt.split(self.end_of_answer):
            instruction, separator, answer = text.partition(self.before_answer)
            if not text or not separator or self.before_answer in answer:
                return
            yield self._lengths(instruction + separator, text, mark)

    def _cut(self, input_ids: list[int]) -> list[int]:
        """What is left of a sample without media before its labels are counted."""
        return input_ids

    @abstractmethod
    def _encode_prompt(self, prompt: str, mark: str) -> list[int]:
        """All token ids of a prompt, BOS included."""

    @abstractmethod
    def _first(self) -> int:
        """Where the first round begins."""

    @abstractmethod
    def _lengths(self, instruction: str, text: str, mark: str) -> tuple[int, int]:
        """Tokens of a round before its answer, and in all."""

    @abstractmethod
    def _counts(self, position: int, rounds: int, input_ids: list[int]) -> tuple[int, int]:
        """Two counts of the sample's tokens, which must agree; `position` is where the last round ends."""


class OriginalUniMoeEncoder(OriginalChatEncoder):
    """Uni-MoE's rules; for SentencePiece tokenizers and `VICUNA_CHAT_TEMPLATE` only."""

    end_of_answer, before_answer = "</s>", " ASSISTANT: "

    def _encode_prompt(self, prompt: str, mark: str) -> list[int]:
        """Texts one by one, placeholders and the tokenizer's own special tokens between them."""
        tokenizer = self.tokenizer
        own = [token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) if token]
        pattern = re.compile(f"({'|'.join(map(re.escape, own))})|{_PLACEHOLDERS.pattern}")
        ids: list[int] = [tokenizer.bos_token_id]
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

    def _first(self) -> int:
        return 1

    def _lengths(self, instruction: str, text: str, mark: str) -> tuple[int, int]:
        # Both count the BOS; the first loses it and the space at its end again.
        return len(self._encode_prompt(instruction, mark)) - 2, len(self._encode_prompt(text, mark))

    def _counts(self, position: int, rounds: int, input_ids: list[int]) -> tuple[int, int]:
        padding = self.tokenizer.unk_token_id  # theirs pads with the unknown token and counts the rest
        return position, sum(token != padding for token in input_ids)


class OriginalBunnyEncoder(OriginalChatEncoder):
    """Bunny's rules, which MoIIE uses: for any tokenizer, with the template of the same version.

    The tokenizer's `model_max_length` acts as in the original: samples without media are cut there before their labels
    are counted, and longer ones are not checked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, version: str) -> None:
        super().__init__(tokenizer, template)
        self.version = version
        separator, self.end_of_answer = BUNNY_SEPARATORS.get(version, ("", ""))
        self.before_answer = f"{separator}ASSISTANT: "
        # Whether the routine for tokenizers that begin with BOS does the counting: of phi3 alone the tokenizer decides.
        self.expects_bos = begins_with_bos(tokenizer) if version == "phi3" else version != "bunny"

    def _with_answers(self, input_ids: list[int], prompt: str, mark: str) -> EncodedChat:
        if self.version != "plain":
            return super()._with_answers(input_ids, prompt, mark)
        images = re.match(f"(?:{IMAGE_TOKEN})*", prompt)
        before = len(self._encode_prompt(images[0] if images else "", mark))  # a caption is all that is learned
        return EncodedChat(input_ids, [index >= before for index in range(len(input_ids))])

    def _encode_prompt(self, prompt: str, mark: str) -> list[int]:
        """The texts between images, each encoded for itself; of the BOS that may begin each the first stays."""
        texts = [self._encode_text(text, mark) for text in prompt.split(IMAGE_TOKEN)]
        bos = [token for token in texts[0][:1] if token == self.tokenizer.bos_token_id]
        ids = list(bos)
        for number, text in enumerate(texts):
            ids += [self.ids_of_control[IMAGE_TOKEN]] * (number > 0) + text[len(bos) :]
        return ids

    def _encode_text(self, text: str, mark: str) -> list[int]:
        """Ids of a text, in which the tokenizer's own special tokens act, but not the media tokens that we added."""
        tokenizer = self.tokenizer
        if mark not in text:
            return tokenizer.encode(text)
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        own = sorted(set(added) - set(MEDIA_TOKENS), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, own)) or r"(?!)")
        ids = tokenizer.encode("")
        for piece in filter(None, re.split(f"({pattern.pattern})", text)):
            if piece in own:
                ids.append(added[piece])
            else:
                plain = piece.replace(mark, "<")
                ids += tokenizer.encode(plain, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _first(self) -> int:
        return int(self.expects_bos)

    def _lengths(self, instruction: str, text: str, mark: str) -> tuple[int, int]:
        # The space before an answer belongs to it. The token that ends it is not in the text: here its BOS stands in.
        before, length = len(self._encode_prompt(instruction, mark)) - 1, len(self._encode_prompt(text, mark))
        return (before - 1, length) if self.expects_bos else (before, length + 1)

    def _counts(self, position: int, rounds: int, input_ids: list[int]) -> tuple[int, int]:
        tokenizer = self.tokenizer
        padding = tokenizer.unk_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        found = sum(token != padding for token in input_ids)
        expected = position - rounds * (padding == tokenizer.eos_token_id)
        return (expected, found) if expected < tokenizer.model_max_length else (found, found)

    def _cut(self, input_ids: list[int]) -> list[int]:
        return input_ids[: self.tokenizer.model_max_length]


def _replace_in_texts(value: Any, mark: str) -> Any:
    """Placeholders in texts begin with a mark in place of `<`."""
    if isinstance(value, str):
        return _PLACEHOLDERS.sub(lambda match: mark + match[0][1:], value)
    if isinstance(value, dict):
        return {key: _replace_in_texts(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_in_texts(item, mark) for item in value]
    return value
