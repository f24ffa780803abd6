"""One question of a benchmark."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

MediaKind = str  # "image", "audio" or "video"


@dataclass(frozen=True)
class Item:
    """One question.

    Fields:
        id: unique within the task, as predictions and submissions name it.
        question: without any instruction.
        answer: the gold answer in whatever form the task's metric takes; None where it is not public.
        media: (kind, what), in the order in which they are shown: a path of the official file as text, to be looked up
            below the data folder; the content as bytes; or a Path that is used as it is.
        options: texts of the options A, B, ...
        hint: context that stands before the question.
        category: for break-downs.
        cluster: items with the same one (an image, a recording) are not independent of each other; "" if on its own.
        record: the official record.
        given: the prompt that the official file itself holds, without placeholders of media.
        template: the wording of this item's prompt, in place of the task's.
    """

    id: Any
    question: str
    answer: Any = None
    media: tuple[tuple[MediaKind, str | bytes | Path], ...] = ()
    _: KW_ONLY
    options: tuple[str, ...] = ()
    hint: str = ""
    category: str = ""
    cluster: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    given: str = ""
    template: str = ""

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return "".join(chr(ord("A") + i) for i in range(len(self.options)))

    @property
    def cluster_key(self) -> str:
        """What the item shares with others: its cluster, else itself."""
        return self.cluster or f"item {self.id}"
