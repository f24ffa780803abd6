"""Conversations from data files; their media stay closed until somebody needs them.

A record is {"id", "modality", "task", "split", "messages", "source"} (only "messages" is required), or {"text": ...}, of
which every token is learned, or one of Uni-MoE's own data files, see `original_data`. A file is JSON lines or a list.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ...errors import DataError
from .json_records import parsed, read_records
from .media_paths import MediaPaths
from .original_data import OriginalRules, VoiceAs, convert, is_original

Sample = dict[str, Any]

MEDIA_KINDS = ("image", "video", "audio")
PLAIN_TEXT_TASK = "plain_text"
MIXED = "mixed"  # the group of a batch that has samples of several
_LISTED = 5


@dataclass(frozen=True)
class Draw:
    """A sample as the sampler asks for it: its index, and the seed of whatever is random about this use of it."""

    index: int
    seed: int


class ConversationDataset(Dataset):
    """Samples of data files.

    Indexing gives a sample with `id`, `modality`, `task` and `messages` (media paths absolute) or `text`. An index may
    be a `Draw`; the sample then also has its seed as `draw_seed`.

    Args:
        files: paths of the files.
        media_root: folder that relative media paths start from, each file's own folder when None; for files in LLaVA's
            form see `MediaPaths`.
        check_media: look whether every media file exists.
        original_rules: of files in LLaVA's form, see `original_data`.
        voice_as: the modality, "speech" or "sound", of audio in samples that do not name theirs.
        max_missing: share of the samples whose media may be missing; these are left out.

    Attributes: samples; left_out, the samples that were left out, each with the reason; of several data sets with
    weights `weights`, one per data set, and `origins`, the number of each sample's data set.

    Raises:
        DataError: unreadable file or record (named as file:line), or missing media.
    """

    def __init__(
        self,
        files: Iterable[str | Path],
        media_root: str | Path | None = None,
        check_media: bool = True,
        original_rules: OriginalRules | None = None,
        max_missing: float = 0.0,
        voice_as: VoiceAs = "speech",
    ) -> None:
        options = (media_root, original_rules, voice_as)
        samples = [sample for file in files for sample in read_samples(Path(file), *options)]
        self._take(samples, check_media, max_missing)

    @classmethod
    def from_samples(
        cls, samples: Iterable[Sample], media_root: str | Path | None = None, check_media: bool = True
    ) -> "ConversationDataset":
        """The same from samples in memory, whose media may also be objects (PIL images, arrays)."""
        root = Path(media_root or ".").absolute()
        dataset = cls.__new__(cls)
        dataset._take([normalised(raw, f"sample {i}", root) for i, raw in enumerate(samples)], check_media)
        return dataset

    @classmethod
    def from_data_sets(
        cls, data_sets: Sequence[Sequence[Sample]], weights: Sequence[float] | None = None, max_missing: float = 0.0
    ) -> "ConversationDataset":
        """One data set of several: normalised samples, and the share that is drawn from each (None: all alike)."""
        dataset = cls.__new__(cls)
        origins = [number for number, samples in enumerate(data_sets) for _ in samples]
        samples = [sample for samples in data_sets for sample in samples]
        dataset._take(samples, True, max_missing, origins, weights)
        return dataset

    def _take(
        self,
        samples: list[Sample],
        check_media: bool,
        max_missing: float = 0.0,
        origins: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not samples:
            raise DataError("There is not a single sample in the data: check the list of files.")
        missing = _missing_media(samples) if check_media else {}
        if len(missing) > max_missing * len(samples):
            raise _too_much_missing(samples, missing, max_missing)
        self.left_out = [(samples[i], f"{' and '.join(paths)} is missing.") for i, paths in missing.items()]
        self.samples = [sample for i, sample in enumerate(samples) if i not in missing]
        self.weights = None if weights is None else list(weights)
        self.origins = [0 if origins is None else origins[i] for i in range(len(samples)) if i not in missing]

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
        wanted = set(names)
        kept = [i for i, s in enumerate(self.samples) if {s["modality"], s["task"], group_of(s)} & wanted]
        chosen.samples, chosen.origins = [self.samples[i] for i in kept], [self.origins[i] for i in kept]
        chosen.weights = self.weights
        chosen.left_out = [(s, why) for s, why in self.left_out if {s["modality"], s["task"], group_of(s)} & wanted]
        return chosen


def group_of(sample: Sample) -> str:
    """What a sample shares a batch with: others of its task, and of its modality where the task's name hides that."""
    task, modality = sample["task"], sample["modality"]
    return task if modality in task else f"{modality}/{task}"


def read_samples(
    file: Path,
    media_root: str | Path | None = None,
    original_rules: OriginalRules | None = None,
    voice_as: VoiceAs = "speech",
) -> Iterator[Sample]:
    """The samples of one file, in order and one at a time; arguments and errors as of `ConversationDataset`."""
    read = sample_reader(file, media_root, original_rules, voice_as)
    for record in parsed(read_records(file)):
        yield read(record.value, record.place)


def sample_reader(
    file: Path,
    media_root: str | Path | None = None,
    original_rules: OriginalRules | None = None,
    voice_as: VoiceAs = "speech",
) -> Callable[[Any, str], Sample]:
    """A function (record, its place) -> sample for the records of a file; it raises DataError."""
    paths = MediaPaths(file.parent, media_root)

    def read(raw: Any, place: str) -> Sample:
        if is_original(raw):
            raw = convert(raw, place, paths, original_rules, voice_as)
        return normalised(raw, place, paths.root, voice_as)

    return read


def media_items(sample: Sample) -> Iterator[dict[str, Any]]:
    """The media content items of a sample, in order; the sound track of a video is an audio item before it."""
    for message in sample.get("messages", ()):
        if isinstance(message["content"], list):
            for item in message["content"]:
                if item.get("type") in MEDIA_KINDS and item.get("sound_track"):
                    pictures = dict(item)
                    del pictures["sound_track"]
                    yield {"type": "audio", "path": media_value(item), "encoder": pictures.pop("encoder", None)}
                    yield pictures
                elif item.get("type") in MEDIA_KINDS:
                    yield item


def media_value(item: dict[str, Any]) -> Any:
    """What a media content item points to: a path, or an object in memory."""
    return item[item["type"]] if item["type"] in item else item["path"]


def normalised(raw: Any, place: str, root: Path, voice_as: VoiceAs = "speech") -> Sample:
    """A record of our format with absolute paths, modality and task. Raises DataError."""
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
    sample.setdefault("modality", _guess_modality(sample, voice_as))
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
    value, aux = item[key], item.get("aux")
    if isinstance(aux, dict) and isinstance(aux.get("map"), str | Path):
        item = {**item, "aux": {**aux, "map": str(root / aux["map"])}}
    if isinstance(value, list) and value and all(isinstance(frame, str | Path) for frame in value):
        return {**item, key: [str(root / frame) for frame in value]}
    return {**item, key: str(root / value)} if isinstance(value, str | Path) else item


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: {value!r} must be a list with at least one entry.")
    return value


def _guess_modality(sample: Sample, voice_as: VoiceAs) -> str:
    kinds = list(dict.fromkeys(voice_as if i["type"] == "audio" else i["type"] for i in media_items(sample)))
    return "+".join(kinds) if kinds else "text"


def paths_of(value: Any) -> list[str]:
    """The paths in a media value: itself, or those of a video's frames."""
    values = value if isinstance(value, list) else [value]
    return [path for path in values if isinstance(path, str)]


def _missing_media(samples: list[Sample]) -> dict[int, list[str]]:
    """Number of a sample -> its media files that are not there."""
    found: dict[str, bool] = {}
    missing: dict[int, list[str]] = {}
    for number, sample in enumerate(samples):
        for path in (path for item in media_items(sample) for path in paths_of(media_value(item))):
            if path not in found:
                found[path] = os.path.isfile(path)
            if not found[path]:
                missing.setdefault(number, []).append(path)
    return missing


def _too_much_missing(samples: list[Sample], missing: dict[int, list[str]], allowed: float) -> DataError:
    listed = [f"{path} (of {samples[number]['id']})" for number, paths in missing.items() for path in paths]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    share = f", in {len(missing)} of {len(samples)} samples, of which {allowed:g} may be unreadable" if allowed else ""
    return DataError(
        f"{len(listed)} media files are missing{share}: {', '.join(listed[:_LISTED])}{more}. Set media_root to the folder "
        "that the paths start from, or remove these samples."
    )
