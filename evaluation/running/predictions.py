"""Predictions on disk: one JSON line each, written as soon as they are there."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..writable_text import is_writable, json_text

Prediction = dict[str, Any]


class PredictionStore:
    """The predictions of one task.

    Every process appends to a part of its own; at the end one of them joins the parts to one file. A last line that
    a crash has damaged is dropped. A prediction is a mapping with `id`, `prompt` (exactly what the model saw) and either
    `prediction` or, if the item failed, `error`.

    Args:
        folder: OUT/predictions.
        task: the task's name.
    """

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task = folder, task

    @property
    def joined(self) -> Path:
        """The file with all predictions once they are complete."""
        return self.folder / f"{self.task}.jsonl"

    def read(self) -> dict[Any, Prediction]:
        """What there is, by id; of several lines of one item the last without an error counts.

        Raises:
            DataError: a line in the middle of a file is damaged, or holds something else than a prediction.
        """
        found: dict[Any, Prediction] = {}
        for file in [self.joined, *self._parts()]:
            for record in _complete_lines(file) if file.is_file() else ():
                if "error" not in record or record["id"] not in found:
                    found[record["id"]] = record
        return found

    def append(self, records: Iterable[Prediction], rank: int = 0) -> None:
        """Write lines to the part of a process, and see that they are on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self.task}.part-{rank:05d}.jsonl"
        _drop_torn_line(file)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json_text(record) + "\n" for record in records)
            stream.flush()
            os.fsync(stream.fileno())

    def join(self, ids: Sequence[Any]) -> dict[Any, Prediction]:
        """Make one file of the parts, in the order of `ids`, and return its content."""
        found = self.read()
        kept = {key: found[key] for key in ids if key in found}
        unfinished = self.joined.with_suffix(".tmp")
        self.folder.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.writelines(json_text(record) + "\n" for record in kept.values())
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(self.joined)
        for part in self._parts():
            part.unlink()
        return kept

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.task}.part-*.jsonl"))


def _complete_lines(file: Path) -> list[Prediction]:
    lines = _whole_part(file.read_bytes()).split(b"\n")[:-1]
    return [_record(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _record(line: bytes, place: str) -> Prediction:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _damaged(place, str(error)) from error
    if not isinstance(record, dict) or not isinstance(record.get("id"), str | int | float):
        raise _damaged(place, "it has no id that is text or a number")
    text = record.get("prediction", "" if "error" in record else None)
    if not isinstance(text, str) or not is_writable(text):
        raise _damaged(place, f"prediction is {text!r} in place of text")
    return record


def _damaged(place: str, why: str) -> DataError:
    return DataError(f"{place} is damaged ({why}): remove the line, or the file.")


def _whole_part(content: bytes) -> bytes:
    """A file's content without what a crash may leave at its end: a line without its end, or one that is no JSON."""
    content = content[: content.rfind(b"\n") + 1]
    last = content.rfind(b"\n", 0, -1) + 1
    try:
        json.loads(content[last:])
    except ValueError:
        return content[:last]
    return content


def _drop_torn_line(file: Path) -> None:
    if not file.is_file():
        return
    with file.open("rb+") as stream:
        content = stream.read()
        whole = len(_whole_part(content))
        if whole < len(content):
            stream.truncate(whole)
