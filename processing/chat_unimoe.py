"""From messages to token ids: a tokenisation that user text cannot trick.

Text written by a user must never turn into a control token: not `<image>` (it would claim features of another medium),
not `<|im_end|>` (it would forge a turn). So control tokens inside message texts are replaced by marks before the
template runs, and the marks are encoded as plain text afterwards. Only the template itself writes control tokens.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .media_fetch_unimoe import place_of
from .media_policy_unimoe import ConversationError, MediaError, MediaLimits, PlaceholderError

MEDIA_KINDS = ("image", "video", "audio")
# Placeholder tokens; `<sound>` is written by the processor only, after the `<audio>` placeholders of the same clip.
IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN, SOUND_TOKEN = MEDIA_TOKENS = ("<image>", "<video>", "<audio>", "<sound>")
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant", "tool")
_MAX_TEMPLATE_CHARACTERS = 200_000
_TURN_MARK = re.compile(r"\[UNUSED_TOKEN_\d+\]")
# What goes wrong in a template, or in Python because of one.
_TEMPLATE_FAILURES = (jinja2.TemplateError, TypeError, ValueError, RecursionError)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = [chr(c) for c in range(0xF0000, 0xF0100)]  # private-use characters; one that no text contains is taken


@dataclass
class MediaItem:
    """One medium of a conversation; `where` names its place for error messages. A sound track's value is its video.

    `aux` is what external vision models saw in an image, see `auxiliary_inputs_unimoe`.
    """

    kind: str
    value: Any
    encoder: str = "both"
    sampling_rate: int | None = None
    where: str = ""
    aux: Any = None


@dataclass
class EncodedChat:
    """Token ids with one placeholder token per medium; `answer` marks the tokens an assistant wrote."""

    input_ids: list[int]
    answer: list[bool]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_tokens: bool = True) -> list[str]:
    """Add the media tokens, and ChatML's two, as far as a tokenizer lacks them; returns those added.

    Grow the model's embedding table afterwards if the tokenizer outgrew it.
    """
    wanted = MEDIA_TOKENS + (CHAT_TOKENS if chat_tokens else ())
    known = tokenizer.get_added_vocab()  # not the vocabulary: what merges made up cannot be found in a text as a whole
    missing = [token for token in wanted if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    return missing


def placeholder_id(tokenizer: PreTrainedTokenizerBase, token: str, tokens_needed: int) -> int | None:
    """The id of a media token; None where the tokenizer lacks it.

    Raises:
        PlaceholderError: it is lacking, but needed.
    """
    number: Any = tokenizer.convert_tokens_to_ids(token)
    is_known = number is not None and number != tokenizer.unk_token_id
    if is_known and number in tokenizer.encode(token, add_special_tokens=False):
        return number
    if tokens_needed:
        raise PlaceholderError(f"The tokenizer has no token {token}: call prepare_tokenizer(tokenizer) first.")
    return None


def read_messages(messages: Any, limits: MediaLimits, where: str = "") -> tuple[list[dict[str, Any]], list[MediaItem]]:
    """Messages in the form that templates see (neighbouring texts joined, media without their data), and the media.

    Raises:
        ConversationError: not a list of messages, unknown role or content type, or too much text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ConversationError(
            f"{where}a conversation is a non-empty list of messages, got {type(messages).__name__}."
        )
    plain: list[dict[str, Any]] = []
    media: list[MediaItem] = []
    characters = 0
    for index, message in enumerate(messages):
        place = f"{where}message {index}"
        is_message = isinstance(message, Mapping) and ("content" in message or message.get("tool_calls"))
        if not is_message or message.get("role") not in ROLES:
            raise ConversationError(f"{place}: needs a 'role', one of {ROLES}, and a 'content'.")
        content = _read_content(message.get("content"), media, place)
        characters += sum(len(item.get("text", "")) for item in content) if isinstance(content, list) else len(content)
        if characters > limits.max_text_characters:
            raise ConversationError(f"{place}: over {limits.max_text_characters} characters of text; shorten it.")
        others = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
        plain.append({**others, "role": message["role"], "content": content})
        check_encodable(plain[-1], place)
    return plain, media


def check_encodable(value: Any, where: str) -> None:
    """Raise a ConversationError if a string in `value` holds half a character, which tokenizers cannot encode."""
    if isinstance(value, str):
        if not value.isascii() and (found := _SURROGATE.search(value)):
            raise ConversationError(
                f"{where}: the text holds a lone surrogate, {found[0]!a}, which is no character; remove it, or decode "
                "the text again from its bytes with errors='replace'."
            )
    elif isinstance(value, Mapping):
        for item in value.values():
            check_encodable(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            check_encodable(item, where)


def media_keys(kind: str) -> tuple[str, ...]:
    """Where a content item may hold its medium."""
    return (kind, "path", "url", "base64")


def _read_content(content: Any, media: list[MediaItem], place: str) -> str | list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise ConversationError(
            f"{place}: 'content' must be a string or a list of items, got {type(content).__name__}."
        )
    items: list[dict[str, Any]] = []
    for index, raw in enumerate(content):
        item = {"type": "text", "text": raw} if isinstance(raw, str) else raw
        where = f"{place}, content {index}"
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text":
            if not isinstance(item.get("text"), str):
                raise ConversationError(f"{where}: a text item needs a string under 'text'.")
            if items and items[-1]["type"] == "text":  # or two harmless halves could join into a control token
                items[-1]["text"] += item["text"]
            else:
                items.append({"type": "text", "text": item["text"]})
        elif kind in MEDIA_KINDS or kind == "image_url":
            for medium in read_media(item, where):
                media.append(medium)
                items.append({"type": medium.kind, **_after(item, where)})
        else:
            raise ConversationError(f"{where}: type {kind!r} is unknown; use text, image, video or audio.")
    return items


def read_media(item: Mapping[str, Any], where: str) -> list[MediaItem]:
    """The medium of an item, and before a video its sound track if asked for: Uni-MoE's order of placeholders."""
    kind = item["type"]
    value = None
    given = [key for key in dict.fromkeys((kind, *media_keys(kind.removesuffix("_url")))) if item.get(key) is not None]
    if len(given) > 1:
        raise ConversationError(f"{where}: the medium is given {len(given)} times, under {given}; keep one of them.")
    if kind == "image_url":  # the form of OpenAI's API
        kind, value = "image", item.get("image_url")
        value = value.get("url") if isinstance(value, Mapping) else value
    for key in (kind, "path", "url"):
        value = item.get(key) if value is None else value
    if value is None and isinstance(item.get("base64"), str):
        value = f"data:{kind}/x;base64,{item['base64']}"
    track = item.get("sound_track") or False
    if not isinstance(track, bool) or (track and kind != "video"):
        raise ConversationError(f"{where}: sound_track is {track!r}; it is True or False, and of videos only.")
    encoder = item.get("encoder") or "both"
    if encoder not in ("both", "speech", "sound") or (encoder != "both" and kind != "audio" and not track):
        raise ConversationError(f"{where}: encoder {encoder!r} is not 'speech', 'sound' or 'both' (audio only).")
    aux = item.get("aux")
    if aux is not None and kind != "image":
        raise ConversationError(f"{where}: 'aux' is of images only; remove it.")
    where = place_of(value, where)
    if not track:
        return [MediaItem(kind, value, encoder, item.get("sampling_rate"), where, aux)]
    if value is not None and not isinstance(value, str | bytes | bytearray | memoryview | os.PathLike):
        raise MediaError("audio", "frames have no sound track; give the video as a file or as its bytes", where)
    return [MediaItem("audio", value, encoder, None, f"{where}, sound track"), MediaItem(kind, value, where=where)]


def _after(item: Mapping[str, Any], where: str) -> dict[str, str]:
    """What a template that separates media from the text writes after this one, in place of its own choice."""
    if item.get("after") is None:
        return {}
    if not isinstance(item["after"], str) or item["after"].strip() or len(item["after"]) > 8:
        raise ConversationError(f"{where}: 'after' must be white space, 8 characters at most, or nothing.")
    return {"after": item["after"]}


def _text_alone(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    media = [item["type"] for item in content if item["type"] != "text"]
    if media:
        raise ConversationError(
            f"The chat template shows text alone, and the conversation has a medium ({media[0]}): give the processor a "
            "chat_template that goes through lists of content items."
        )
    return "".join(item["text"] for item in content)


def choose_template(own: str | dict[str, str], wanted: str | None) -> str:
    """The Jinja source to use: `wanted` is the name of one of a processor's own templates, or source, or None.

    Raises:
        ConversationError: there are several and none is the default.
    """
    templates = own if isinstance(own, dict) else {"default": own}
    source = templates.get(wanted or "default", wanted)
    if source is None:
        raise ConversationError(f"No chat template is the default; name one of {sorted(templates)}.")
    return source


class ChatEncoder:
    """Renders conversations with a template and encodes them, safe against control tokens in the texts.

    Args:
        tokenizer: any tokenizer whose vocabulary holds the placeholder tokens used.
        template: Jinja source; answers must stand between `{% generation %}` and `{% endgeneration %}` if labels or
            assistant masks are wanted.
        spaced: put a space before every text that follows a control token, as SentencePiece tokenizers in their legacy
            form do when text pieces are encoded one by one. Released Uni-MoE checkpoints were trained on these tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, spaced: bool = False) -> None:
        if len(template) > _MAX_TEMPLATE_CHARACTERS:
            limit = _MAX_TEMPLATE_CHARACTERS
            raise ConversationError(f"The chat template has {len(template)} characters; allowed are {limit}.")
        self.tokenizer, self.template, self.spaced = tokenizer, template, spaced
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        control = {token for token, special in added.items() if token.strip() and (special or token in template)}
        # InternLM2's marks of turns are pieces of its vocabulary like any word.
        control |= set(_TURN_MARK.findall(template)) & set(tokenizer.get_vocab())
        control |= set(tokenizer.all_special_tokens) | set(MEDIA_TOKENS)
        self.control_tokens = sorted(control, key=lambda token: (-len(token), token))  # the longest match wins
        numbers: Any = tokenizer.convert_tokens_to_ids(self.control_tokens)
        self.ids_of_control: dict[str, int] = dict(zip(self.control_tokens, numbers, strict=True))
        self.control_ids = set(numbers)
        self._control = re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")
        self._newline = tokenizer.encode("\n", add_special_tokens=False)

    def render(self, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The prompt as text, and the character spans of assistant answers in it.

        Raises:
            ConversationError: the template fails on these messages, or shows text alone and they hold media.
        """
        options = {**self.tokenizer.special_tokens_map, **options}
        track = self.marks_answers and not options.get("continue_final_message")
        if not self._takes_items:
            messages = [{**message, "content": _text_alone(message["content"])} for message in messages]
        try:
            prompts, spans = self._rendered(messages, return_assistant_tokens_mask=track, **options)
        except _TEMPLATE_FAILURES as error:
            raise ConversationError(f"The chat template cannot show this conversation: {str(error)[:300]}") from None
        return prompts[0], [(first, last) for first, last in spans[0]] if track else []

    @cached_property
    def _takes_items(self) -> bool:
        """Whether the template goes through lists of content items; those of many language models know strings only."""

        def shows(content: Any) -> bool:
            probe = [{"role": "user", "content": content}]
            try:
                [prompt], _ = self._rendered(probe, **self.tokenizer.special_tokens_map)
            except _TEMPLATE_FAILURES:
                return False
            return "probe" in prompt and "'type'" not in prompt  # else it shows the list as Python writes it

        return shows([{"type": "text", "text": "probe"}]) or not shows("probe")

    def _rendered(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[str], list[Any]]:
        rendered: Any = render_jinja_template(conversations=[messages], chat_template=self.template, **options)
        return rendered

    def encode(self, messages: list[dict[str, Any]], **options: Any) -> EncodedChat:
        """Render and encode; texts of the messages (and `tools`, `documents`) become plain text whatever they hold."""
        mark = self._unused_mark([messages, options])
        escaped = self._escape(messages, mark)
        for name in ("tools", "documents"):
            if options.get(name):
                check_encodable(options[name], name)
                options[name] = self._escape(options[name], mark)
        prompt, spans = self.render(escaped, **options)
        encoded = EncodedChat([], [])
        after_control = True
        for piece, is_plain, is_answer in self._split(prompt, spans, mark):
            if is_plain:
                ids, after_control = self._encode_plain(piece), False
            elif self.spaced:
                ids, after_control = self._encode_spaced(piece, after_control)
            else:
                ids = self._encode_piece(piece, first=not encoded.input_ids)
            encoded.input_ids += ids
            encoded.answer += [is_answer] * len(ids)
        return encoded

    def _unused_mark(self, data: Any) -> str:
        used: set[str] = set()

        def collect(value: Any) -> None:
            if isinstance(value, str):
                used.update(mark for mark in _MARKS if mark in value) if not value.isascii() else None
            elif isinstance(value, Mapping):
                for key in value:
                    collect(value[key])
            elif isinstance(value, list | tuple):
                for item in value:
                    collect(item)

        collect(data)
        free = [mark for mark in _MARKS if mark not in used]
        if not free:
            raise ConversationError("The texts use all 256 private characters U+F0000 to U+F00FF; remove some.")
        return free[0]

    def _escape(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._control.sub(lambda match: f"{mark}{self.control_tokens.index(match[0])}{mark}", value)
        if isinstance(value, Mapping):
            return {key: self._escape(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._escape(item, mark) for item in value]
        return value

    def _split(self, prompt: str, spans: Sequence[tuple[int, int]], mark: str) -> list[tuple[str, bool, bool]]:
        """Pieces (text, is plain text, is answer), cut at marks and at the borders of answers.

        Cutting at answers makes the tokens of a trained answer those that generation produces after the same prompt.
        """
        marked = list(re.finditer(f"{mark}([0-9]+){mark}", prompt))
        borders = {0, len(prompt)} | {end for span in spans for end in span}
        borders |= {position for match in marked for position in match.span()}
        tokens = {match.start(): self.control_tokens[int(match[1])] for match in marked}
        cuts = sorted(borders)
        pieces = []
        for start, end in itertools.pairwise(cuts):
            is_answer = any(first <= start < last for first, last in spans)
            pieces.append((tokens.get(start, prompt[start:end]), start in tokens, is_answer))
        return pieces

    def _encode_piece(self, text: str, first: bool) -> list[int]:
        """Ids of a piece; inside a prompt it is encoded after a newline, which keeps SentencePiece from adding a space."""
        if not first:
            ids = self.tokenizer.encode("\n" + text, add_special_tokens=False)
            if self._newline and ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_spaced(self, text: str, after_control: bool) -> tuple[list[int], bool]:
        """Ids of a piece that follows a control token or not, and whether it ends in one."""
        ids: list[int] = []
        for piece in re.split(f"({self._control.pattern})", text):
            if piece in self.ids_of_control:
                ids.append(self.ids_of_control[piece])
                after_control = True
            elif piece:
                ids += self._encode_piece(" " + piece if after_control else piece, first=False)
                after_control = False
        return ids, after_control

    def _encode_plain(self, token: str) -> list[int]:
        """Ids of a control token's characters as ordinary text: encoded in parts, so that no part is the token."""
        for cut in range(1, len(token)):
            ids = self._encode_piece(token[:cut], first=False) + self._encode_piece(token[cut:], first=False)
            if not self.control_ids.intersection(ids) - {self.tokenizer.unk_token_id}:
                return ids
        raise PlaceholderError(
            f"The text holds {token!r}, which this tokenizer cannot write as plain text; remove it."
        )
