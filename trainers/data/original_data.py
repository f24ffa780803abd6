"""Uni-MoE's and MoIIE's own data files, which have LLaVA's form, as conversations of our format.

A record is {"conversations": [{"from": "human"|"gpt", "value": text}, ...], "image": path, "video": [frame paths],
"voice": [audio paths]}; the texts hold one `<image>`, `<video>` or `<audio>` per medium. Beyond what the authors' code
takes, `image` may be a list, `video` the path of a clip or a list of frame lists, and an image may be base64.

Where the authors' code goes wrong in silence, ours is right by default; `original_rules` "unimoe" or "bunny" does as
theirs does (MoIIE's is that of Bunny):

* A medium that no placeholder stands for (voice without `<audio>`) is ignored by theirs. Ours puts its placeholder before
  the first question, in the order of their inference scripts: images, audio, videos.
* A placeholder without a medium (two `<image>`, one image) takes the next sample's image in theirs. Ours is a DataError,
  also when some but not all media have placeholders.
* Uni-MoE's training code takes `<video>` for plain text in a sample with neither image nor voice. Ours is a video.
* Bunny moves the only `<image>` of a turn to its start, and white space around the rest is lost. Ours leaves it.
* Bunny knows images only; `<audio>` and `<video>` are text.
* A placeholder whose medium lies under another key (`audio` for `voice`) or under an empty one costs the medium in theirs.
  Ours is a DataError.
* A leading answer is dropped in all: there is no prompt to learn it from. An answer that is missing is a DataError here.

What was put right is told in `sample["remarks"]`.
"""

import base64
import binascii
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal, get_args

from ...errors import DataError

Sample = dict[str, Any]
OriginalRules = Literal["unimoe", "bunny"]
VoiceAs = Literal["speech", "sound"]

_ROLES = {"human": "user", "gpt": "assistant"}
_KEYS = {"image": "image", "audio": "voice", "video": "video"}  # in the order of placeholders at inference
_MODALITY_ORDER = ("image", "video", "audio")
# Keys that mean a medium in other data files, by ours; misspelt ones are found by their likeness.
_OTHER_KEYS = {
    "image": {"images", "img", "picture", "pictures", "photo"},
    "voice": {"audio", "audios", "voices", "speech", "sound", "sounds", "wav"},
    "video": {"videos", "clip", "frames"},
}
# By rules: the kinds of media there are, and the keys of which one makes their placeholders act.
_KINDS: dict[str | None, tuple[str, ...]] = {None: tuple(_KEYS), "unimoe": tuple(_KEYS), "bunny": ("image",)}
_ACTING: dict[str, set[str]] = {"unimoe": {"image", "voice"}, "bunny": {"image"}}
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{200,}={0,2}\s*")


def is_original(value: Any) -> bool:
    """Whether a record has the authors' form."""
    return isinstance(value, dict) and "conversations" in value and "messages" not in value and "text" not in value


def convert(
    record: dict[str, Any],
    place: str,
    absolute: Callable[[str], str] = str,
    original_rules: OriginalRules | None = None,
    voice_as: VoiceAs = "speech",
) -> Sample:
    """One record as a sample of our format; no medium is opened.

    Args:
        place: names the record in messages, and in its sample if it has no `id`.
        absolute: makes an absolute path of one in the record, see `MediaPaths`.
        original_rules: do as the code of these authors does, see above.
        voice_as: what the clips under `voice` are called in `modality`: "speech" or "sound".

    Returns:
        `id`, `modality`, `task`, `messages`, `source` (the record's other fields) and, if any, `remarks`. A last answer
        that is empty, as in the authors' evaluation files, is left out.

    Raises:
        DataError: the record is malformed, or media and placeholders do not match.
    """
    if original_rules not in _KINDS:
        raise DataError(f"original_rules is {original_rules!r}; use one of {sorted(_ACTING)}, or None.")
    if voice_as not in get_args(VoiceAs):
        raise DataError(f"voice_as is {voice_as!r}; use 'speech' or 'sound'.")
    remarks: list[str] = []
    turns = _read_turns(record["conversations"], place, remarks)
    kinds = _KINDS[original_rules]
    media = {kind: _read_media(kind, record.get(_KEYS[kind]), place, absolute) for kind in kinds}
    if original_rules is None:
        _require_media_of_placeholders(record, turns, media, place)
    acts = any(media.values()) if original_rules is None else bool(_ACTING[original_rules] & set(record))
    if acts:
        given = {kind: len(items) for kind, items in media.items()}
        written = {kind: sum(text.count(f"<{kind}>") for _, text in turns) for kind in kinds}
        if original_rules is None:
            turns = _with_missing_placeholders(turns, given, written, place, remarks)
        elif any(given[kind] > written[kind] for kind in kinds):
            remarks.append("media without a placeholder are ignored")
        if original_rules == "bunny":
            turns = [(role, _image_first(text)) for role, text in turns]
        messages = [{"role": role, "content": _content(text, media)} for role, text in turns]
    else:
        if any(f"<{kind}>" in text for kind in kinds for _, text in turns):
            remarks.append("a placeholder in a record without media stays text")
        messages = [{"role": role, "content": text} for role, text in turns]
    if original_rules is None:
        messages = _without_open_answer(messages, place)
    names = [voice_as if kind == "audio" else kind for kind in _MODALITY_ORDER if record.get(_KEYS[kind])]
    modality = "+".join(names) or "text"
    known = {"id", "conversations", *_KEYS.values()}
    sample = {
        "id": str(record.get("id", place)),
        "modality": modality,
        "task": modality,
        "messages": messages,
        "source": {name: value for name, value in record.items() if name not in known},
    }
    return {**sample, "remarks": remarks} if remarks else sample


def _read_turns(turns: Any, place: str, remarks: list[str]) -> list[tuple[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: 'conversations' must be a list with at least one turn.")
    read = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(field), str) for field in ("from", "value")):
            raise DataError(f"{place}: turn {number} must have 'from' (human or gpt) and a text under 'value'.")
        if turn["from"] not in _ROLES:
            raise DataError(f"{place}: turn {number} must have 'from' (human or gpt) and a text under 'value'.")
        read.append((_ROLES[turn["from"]], turn["value"]))
    if read[0][0] == "assistant":
        remarks.append("a leading answer is dropped")
        read = read[1:]
    for number, (role, _) in enumerate(read):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(f"{place}: two turns of the {role} follow each other; human and gpt must take turns.")
    if not read:
        raise DataError(f"{place} has an answer only; it needs a turn of the human before it.")
    return read


def _require_media_of_placeholders(
    record: dict[str, Any], turns: list[tuple[str, str]], media: dict[str, list[dict[str, Any]]], place: str
) -> None:
    """Raises DataError for a placeholder whose medium seems to be given under a wrong key, or is given empty."""
    for kind, key in _KEYS.items():
        if media[kind] or not any(f"<{kind}>" in text for _, text in turns):
            continue
        if record.get(key) is not None:
            raise DataError(
                f"{place}: {key!r} is empty, but the text has <{kind}>: fill it, or remove the placeholder."
            )
        for other in set(record) - {"id", "conversations", *_KEYS.values()}:
            if other.lower() in _OTHER_KEYS[key] or get_close_matches(other.lower(), [key], cutoff=0.75):
                raise DataError(
                    f"{place}: the text has <{kind}>, but there is no {key!r}; did you mean {key!r} where it says "
                    f"{other!r}?"
                )


def _read_media(kind: str, value: Any, place: str, absolute: Callable[[str], str]) -> list[dict[str, Any]]:
    """The media of a kind as content items without white space after them: that stands in the texts."""
    if kind == "video":
        clips = [] if not value else [value] if isinstance(value, str) or _are_paths(value) else value
    else:
        clips = [] if not value else [value] if isinstance(value, str) else value
    if not isinstance(clips, list):
        raise DataError(f"{place}: {_KEYS[kind]!r} is a {type(value).__name__}; it must be a path or a list of paths.")
    items = []
    for clip in clips:
        item: dict[str, Any] = {"type": kind, "after": ""}
        if kind == "video" and _are_paths(clip):
            item["video"] = [absolute(frame) for frame in clip]
        elif not isinstance(clip, str) or not clip:
            raise DataError(f"{place}: {_KEYS[kind]!r} holds {str(clip)[:80]!r}, which is not a path.")
        elif kind == "image" and _BASE64.fullmatch(clip):
            item["image"] = _decoded(clip, place)
        else:
            item["path"] = absolute(clip)
        items.append(item)
    return items


def _are_paths(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(path, str) and path for path in value)


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        raise DataError(f"{place}: the image is neither a path nor base64.") from None


def _with_missing_placeholders(
    turns: list[tuple[str, str]], given: dict[str, int], written: dict[str, int], place: str, remarks: list[str]
) -> list[tuple[str, str]]:
    """The turns with the placeholders of kinds that have none before the first question."""
    wrong = [f"{written[k]} <{k}> for {given[k]} under {_KEYS[k]!r}" for k in _KEYS if written[k] not in (0, given[k])]
    if wrong:
        raise DataError(f"{place}: {', '.join(wrong)}; every medium needs one placeholder, and only that.")
    lacking = {kind: given[kind] for kind in _KEYS if given[kind] > written[kind]}
    if not lacking:
        return turns
    for kind in lacking:
        remarks.append(f"{_KEYS[kind]} without <{kind}>: placed before the first question")
    first = "".join(f"<{kind}>\n" * count for kind, count in lacking.items()) + turns[0][1]
    return [(turns[0][0], first), *turns[1:]]


def _image_first(text: str) -> str:
    """Bunny's rule for a turn that holds one image."""
    if text.count("<image>") != 1 or text.startswith("<image>"):
        return text
    return f"<image>\n{text.replace('<image>', '').strip()}".strip()


def _content(text: str, media: dict[str, list[dict[str, Any]]]) -> str | list[dict[str, Any]]:
    """A text as content items; the media found in it are taken from the front of `media`."""
    placeholders = [f"<{kind}>" for kind in media]
    pieces = [piece for piece in re.split(f"({'|'.join(placeholders)})", text) if piece]
    if not set(placeholders) & set(pieces):
        return text
    items: list[dict[str, Any]] = []
    for piece in pieces:
        if piece not in placeholders:
            items.append({"type": "text", "text": piece})
            continue
        kind = piece[1:-1]
        # One too many, by the original's rules only: it is tokenised, but there is nothing to open.
        items.append(media[kind].pop(0) if media[kind] else {"type": kind, kind: None, "after": ""})
    return items


def _without_open_answer(messages: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    kept = messages[:-1] if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""} else messages
    if any(not message["content"] for message in kept):
        raise DataError(f"{place}: a turn is empty; fill it or remove the turns from there on.")
    return kept
