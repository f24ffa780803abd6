"""The `data` of a recipe: which data sets are trained on, and in which shares."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import RecipeError
from .recipe_values import require, require_choice, require_range

VOICES = ("speech", "sound")
# What a sample may be made of, see `columns`; the lists are the ways to say what is learned.
LEARNED = (("messages",), ("conversations",), ("text",), ("question", "answer"))
MEDIA_COLUMNS = ("image", "video", "audio")
NAMES = ("id", "modality", "task", "split")
_COLUMNS = (*(name for names in LEARNED for name in names), *MEDIA_COLUMNS, *NAMES)
# Fields that say where the same data lie, or nothing about what is trained on.
_PLACES = ("path", "media_root")


@dataclass
class DataEntry:
    """One data set. A path alone stands for an entry with all else left out.

    Args:
        path: a data file (.jsonl, .json, .parquet), or a folder: one with such files, in the order of their names, or one
            that `datasets` saved (`save_to_disk`).
        hub: in place of path: the id of a data set on the Hub. Only what is named here is ever asked for there.
        subset, revision: of a data set on the Hub: the name of its configuration, and a commit, branch or tag.
        split: of `datasets` data sets the name of the split; of files, records whose own `split` says so. None: all
            records of files; of data sets "train".
        weight: share of the samples that are drawn from here, relative to the other entries' weights. All entries of a
            list have one, or none: then every sample counts alike, wherever it is from.
        streaming: read while training, again and again, in place of once into memory.
        shuffle_buffer: samples of a stream that wait to be drawn in random order; 1 leaves the order.
        max_samples: only so many samples, the first ones.
        media_root: the folder that media paths start from, in place of the recipe's.
        columns: what a sample is made of -> the name of its column here: `messages`, `conversations` (LLaVA's form),
            `text`, or `question` and `answer`; beside these `image`, `video`, `audio`, `id`, `modality`, `task`, `split`.
            Empty: records have one of our forms already.
        voice_as: what audio is that does not say so, in place of the recipe's.
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None
    weight: float | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    max_samples: int | None = None
    media_root: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    voice_as: Literal["speech", "sound"] | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path or self.hub or "the given data set"

    def check(self, where: str) -> None:
        """Raise RecipeError for what no data set could satisfy."""
        if (self.path is None) == (self.hub is None):
            raise RecipeError(f"{where} has path = {self.path!r} and hub = {self.hub!r}: give exactly one of them.")
        if self.hub is not None:
            parts = self.hub.split("/")
            fits = len(parts) <= 2 and all(parts) and not set(self.hub) & set(' \\:*?"<>|')
            require(fits, f"{where}.hub", self.hub, "the id of a data set on the Hub, such as owner/name")
        for name in ("subset", "revision"):
            require(
                self.hub is not None or getattr(self, name) is None, f"{where}.{name}", getattr(self, name),
                "left out where there is no hub",
            )  # fmt: skip
        self.check_settings(where)

    def check_settings(self, where: str) -> None:
        """`check` without the place, which data sets in memory do not have."""
        if self.weight is not None:
            fits = math.isfinite(self.weight) and self.weight > 0
            require(fits, f"{where}.weight", self.weight, "a positive number; leave the entry out for none of it")
        require_range(f"{where}.shuffle_buffer", self.shuffle_buffer, 1, 1 << 24)
        if self.max_samples is not None:
            require_range(f"{where}.max_samples", self.max_samples, 1, 1 << 40)
        if self.voice_as is not None:
            require_choice(f"{where}.voice_as", self.voice_as, VOICES)
        self._check_columns(f"{where}.columns")

    def _check_columns(self, where: str) -> None:
        for name in self.columns:
            require_choice(where, name, _COLUMNS)
        ways = [names for names in LEARNED if set(names) & set(self.columns)]
        if not self.columns:
            return
        if len(ways) != 1 or not set(ways[0]) <= set(self.columns):
            raise RecipeError(
                f"{where} is {self.columns}; it must name exactly one of these: "
                f"{', '.join(' with '.join(names) for names in LEARNED)}."
            )
        media = sorted(set(MEDIA_COLUMNS) & set(self.columns))
        if media and ways[0] != LEARNED[-1]:
            raise RecipeError(
                f"{where} names {media}, which go with question and answer only: messages hold their own."
            )


def entries_of(data: Sequence[str | DataEntry]) -> list[DataEntry]:
    """The same list with a `DataEntry` for every plain path."""
    return [DataEntry(path=entry) if isinstance(entry, str) else entry for entry in data]


def check_data(where: str, data: Sequence[str | DataEntry]) -> None:
    """Raise RecipeError if a list of entries is impossible, by itself."""
    require(bool(data), where, data, "a list with at least one file or data set")
    entries = entries_of(data)
    for index, entry in enumerate(entries):
        entry.check(f"{where}[{index}]")
    weighted = [entry.weight is not None for entry in entries]
    lacks = next((index for index, has in enumerate(weighted) if not has), None)
    if any(weighted) and lacks is not None:
        raise RecipeError(
            f"{where}[{lacks}] ({entries[lacks].name}) has no weight, but others have: give every entry one, or none."
        )
    streamed = next((index for index, entry in enumerate(entries) if entry.streaming), None)
    if streamed is not None and len(entries) > 1 and not any(weighted):
        raise RecipeError(
            f"{where}[{streamed}] ({entries[streamed].name}) is streamed beside other data, so nobody knows how much of "
            "the whole it is: give every entry a weight."
        )


def check_batches(stage: Any, where: str) -> None:
    """Raise RecipeError if a stage's settings of how samples become batches do not go together."""
    require_choice(f"{where}.batches", stage.batches, ("by_modality", "mixed"))
    if stage.max_length is not None:
        require_range(f"{where}.max_length", stage.max_length, 2, 1 << 24)
    for name in ("packing", "cut_long_texts"):
        if getattr(stage, name) and stage.max_length is None:
            raise RecipeError(
                f"{where}.{name} is true, but there is no max_length: say how many tokens a row may have."
            )
    if stage.batches == "mixed":
        for name in ("packing", "modality_weights"):
            if getattr(stage, name):
                raise RecipeError(
                    f"{where} has {name}, which needs batches of one modality: leave batches: mixed out."
                )


def check_use_of_data(recipe: Any, stage: Any, where: str) -> None:
    """Raise RecipeError for media beyond the recipe's media_root, and if a stage cannot train on streams and gets some."""
    data = recipe.data if stage.data is None else stage.data
    for entry in entries_of(data):
        if recipe.media_root is not None and entry.media_root is not None:
            inside = Path(entry.media_root).absolute().is_relative_to(Path(recipe.media_root).absolute())
            require(inside, f"media_root of {entry.name}", entry.media_root, "inside of the recipe's media_root")
    if not is_streamed(data):
        return
    if recipe.cache is not None:
        raise RecipeError(f"{where} trains on streamed data, but the cache needs all media beforehand: leave one out.")
    if stage.kind == "experts":
        raise RecipeError(f"{where} is of kind 'experts', which needs its data in memory: leave streaming out for it.")
    if stage.modality_weights:
        raise RecipeError(
            f"{where}.modality_weights cannot be kept with streamed data, whose modalities come as they come: leave it out "
            "and give the data sets weights."
        )


def is_streamed(data: Sequence[str | DataEntry]) -> bool:
    """Whether a list of entries is read while training."""
    return any(entry.streaming for entry in entries_of(data))


def settings_of(data: Sequence[str | DataEntry]) -> list[dict[str, Any]] | None:
    """What decides which samples are drawn when, apart from the places where they lie; None for paths alone."""
    entries = [{name: v for name, v in asdict(e).items() if name not in _PLACES} for e in entries_of(data)]
    plain = {name: v for name, v in asdict(DataEntry()).items() if name not in _PLACES}
    return None if all(entry == plain for entry in entries) else entries
