"""From items to what a model is asked: messages with media that are there, or the reason why they cannot be asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks.data_folder import DataFolder
from ..tasks.item import Item
from ..tasks.task import Task


@dataclass(frozen=True)
class Request:
    """One question as messages of our format; `missing` names media that are not there, `letters` the options."""

    id: Any
    text: str
    media: tuple[dict[str, Any], ...] = ()
    missing: tuple[str, ...] = ()
    letters: str = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A conversation of one question."""
        return [{"role": "user", "content": [*self.media, {"type": "text", "text": self.text}]}]


def make_requests(task: Task, items: Sequence[Item], data: Path, system: str) -> list[Request]:
    """One request per item, in order."""
    folder = DataFolder(data, task.name)
    return [_request(task, item, folder, system) for item in items]


def _request(task: Task, item: Item, folder: DataFolder, system: str) -> Request:
    media: list[dict[str, Any]] = []
    missing: list[str] = []
    for kind, value in item.media:
        if isinstance(value, bytes):
            media.append({"type": kind, kind: value})
            continue
        path = value if isinstance(value, Path) else folder.medium(value)
        if path is None or not path.is_file():
            missing.append(str(value))
        else:
            media.append({"type": kind, "path": str(path.absolute())})
    return Request(item.id, task.prompt(item, system), tuple(media), tuple(missing), item.letters)


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """About `limit` items, evenly spread; items of one cluster stay together (MME scores pictures, not questions)."""
    if limit is None or limit >= len(items):
        return list(items)
    clusters: dict[str, list[Item]] = {}
    for item in items:
        clusters.setdefault(item.cluster_key, []).append(item)
    groups = list(clusters.values())
    wanted = max(1, round(limit * len(groups) / len(items)))
    return [item for i in range(wanted) for item in groups[i * len(groups) // wanted]]
