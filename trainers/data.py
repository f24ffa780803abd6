"""Conversations from JSON-lines files; their media stay closed until somebody needs them.

A line is {"id", "modality", "task", "split", "messages", "source"} (only "messages" is required) or {"text": ...}, of
which every token is learned.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from unimoe.errors import DataError

Sample = dict[str, Any]

MEDIA_KINDS = ("image", "video", "audio")
PLAIN_TEXT_TASK = "plain_text"
_LISTED = 5


@dataclass(frozen=True)
class Draw:
    """A sample as the sampler asks for it: its index, and the seed of whatever is random about this use of it."""

    index: int
    seed: int


class ConversationDataset(Dataset):
    """Samples of JSON-lines files.

    Indexing gives a sample with `id`, `modality`, `task` and `messages` (media paths absolute) or `text`. An index may
    be a `Draw`; the sample then also has its seed as `draw_seed`.

    Args:
        files: paths of the files.
        media_root: folder that relative media paths start from; each file's own folder when None.
        check_media: look whether every media file exists.

    Raises:
        DataError: unreadable file or line (named as file:line), or missing media.
    """

    def __init__(
        self, files: Iterable[str | Path], media_root: str | Path | None = None, check_media: bool = True
    ) -> None:
        samples: list[Sample] = []
        for file in map(Path, files):
            root = file.parent if media_root is None else Path(media_root)
            samples += [_normalised(raw, place, root.absolute()) for place, raw in _read_lines(file)]
        self._take(samples, check_media)

    @classmethod
    def from_samples(
        cls, samples: Iterable[Sample], media_root: str | Path | None = None, check_media: bool = True
    ) -> "ConversationDataset":
        """The same from samples in memory, whose media may also be objects (PIL images, arrays)."""
        root = Path(media_root or ".").absolute()
        dataset = cls.__new__(cls)
        dataset._take([_normalised(raw, f"sample {i}", root) for i, raw in enumerate(samples)], check_media)
        return dataset

    def _take(self, samples: list[Sample], check_media: bool) -> None:
        if not samples:
            raise DataError("There is not a single sample in the data: check the list of files.")
        if check_media:
            _require_media(samples)
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | Draw) -> Sample:
        if isinstance(index, Draw):
            return {**self.samples[index.index], "draw_seed": index.seed}
        return self.samples[index]

    @property
    def groups(self) -> dict[str, list[int]]:
        """Indices of the samples of each group (see `group_of`), in order of first appearance."""
        groups: dict[str, list[int]] = {}
        for index, sample in enumerate(self.samples):
            groups.setdefault(group_of(sample), []).append(index)
        return groups

    def names_of(self, group: str) -> tuple[str, str, str]:
        """The names that stand for a group's samples: its own, their task, their modality."""
        sample = next(sample for sample in self.samples if group_of(sample) == group)
        return group, sample["task"], sample["modality"]

    def select(self, names: Sequence[str]) -> "ConversationDataset":
        """The samples whose modality, task or group is among the names; all of them when no name is given.

        Raises:
            DataError: a name that no sample has.
        """
        if not names:
            return self
        known = {name for sample in self.samples for name in (sample["modality"], sample["task"], group_of(sample))}
        if unknown := sorted(set(names) - known):
            raise DataError(f"No sample has the modality or task {unknown}; the data have {sorted(known)}.")
        chosen = ConversationDataset.__new__(ConversationDataset)
        chosen.samples = [s for s in self.samples if {s["modality"], s["task"], group_of(s)} & set(names)]
        return chosen


def group_of(sample: Sample) -> str:
    """What a sample shares a batch with: others of its task, and of its modality where the task's name hides that."""
    task, modality = sample["task"], sample["modality"]
    return task if modality in task else f"{modality}/{task}"


def media_items(sample: Sample) -> Iterator[dict[str, Any]]:
    """The media content items of a sample, in order."""
    for message in sample.get("messages", ()):
        if isinstance(message["content"], list):
            yield from (item for item in message["content"] if item.get("type") in MEDIA_KINDS)


def media_value(item: dict[str, Any]) -> Any:
    """What a media content item points to: a path, or an object in memory."""
    return item[item["type"]] if item["type"] in item else item["path"]


def _read_lines(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"{file}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{file}:{number} is not JSON ({error.msg}): correct or remove the line."
                    ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The data file {file} cannot be read ({error}): check path and encoding (UTF-8).") from error


def _normalised(raw: Any, place: str, root: Path) -> Sample:
    if not isinstance(raw, dict) or ("messages" in raw) == ("text" in raw):
        raise DataError(f"{place} must be a mapping with either 'messages' or 'text'.")
    sample = {"id": place, **raw}
    if "text" in raw:
        if not isinstance(raw["text"], str) or not raw["text"]:
            raise DataError(f"{place}: 'text' is {raw['text']!r}; it must be text that is not empty.")
        sample.setdefault("modality", "text")
        sample.setdefault("task", PLAIN_TEXT_TASK)
        return sample
    sample["messages"] = [_normalised_message(message, place, root) for message in _list(raw["messages"], place)]
    if not any(message["role"] == "assistant" for message in sample["messages"]):
        raise DataError(f"{place} has no message of the assistant, so there is nothing to learn from it.")
    sample.setdefault("modality", _guess_modality(sample))
    sample.setdefault("task", sample["modality"])
    return sample


def _normalised_message(message: Any, place: str, root: Path) -> dict[str, Any]:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise DataError(f"{place}: the message {message!r} must be a mapping with 'role' and 'content'.")
    if isinstance(message["content"], str):
        return message
    content = []
    for item in _list(message["content"], place):
        if not isinstance(item, dict) or "type" not in item:
            raise DataError(f"{place}: the content item {item!r} must be a mapping with a 'type'.")
        content.append(_with_absolute_path(item, place, root) if item["type"] in MEDIA_KINDS else item)
    return {**message, "content": content}


def _with_absolute_path(item: dict[str, Any], place: str, root: Path) -> dict[str, Any]:
    key = item["type"] if item["type"] in item else "path"
    if key not in item:
        raise DataError(f"{place}: the {item['type']} item has neither 'path' nor {item['type']!r}.")
    value = item[key]
    return {**item, key: str(root / value)} if isinstance(value, str | Path) else item


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: {value!r} must be a list with at least one entry.")
    return value


def _guess_modality(sample: Sample) -> str:
    kinds = list(dict.fromkeys("speech" if i["type"] == "audio" else i["type"] for i in media_items(sample)))
    return "+".join(kinds) if kinds else "text"


def _require_media(samples: list[Sample]) -> None:
    found: dict[str, bool] = {}
    missing = []
    for sample in samples:
        for value in (media_value(item) for item in media_items(sample)):
            if isinstance(value, str):
                if value not in found:
                    found[value] = Path(value).is_file()
                if not found[value]:
                    missing.append(f"{value} (of {sample['id']})")
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise DataError(
            f"{len(missing)} media files are missing: {', '.join(missing[:_LISTED])}{more}. Set media_root to the "
            "folder that the paths start from, or remove these samples."
        )
