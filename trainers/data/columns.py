"""Rows of tables as records of our format."""

from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ..recipe.recipe_data import MEDIA_COLUMNS


def from_columns(row: Any, columns: Mapping[str, str], place: str) -> dict[str, Any]:
    """A record made of the columns of a row that `DataEntry.columns` names; other columns are left out.

    Media come before the question, in the order of `columns`; a column of media may hold a list, or nothing.

    Raises:
        DataError: the row lacks a column, or question or answer are no text.
    """
    if not isinstance(row, dict):
        raise DataError(f"{place} must be a mapping with the columns {', '.join(columns.values())}.")
    if missing := [column for column in columns.values() if column not in row]:
        raise DataError(f"{place} has no column {missing[0]!r}; it has {', '.join(map(str, row)) or 'none'}.")
    found = {name: row[column] for name, column in columns.items()}
    # The media of records in LLaVA's form stand beside their turns.
    beside = {name: row[name] for name in ("image", "voice", "video") if "conversations" in found and name in row}
    if "question" not in found:
        return {**found, **beside}
    content: list[dict[str, Any]] = []
    for kind in found:
        if kind in MEDIA_COLUMNS and found[kind] is not None:
            values = found[kind] if isinstance(found[kind], list) and kind != "video" else [found[kind]]
            content += [{"type": kind, kind: value} for value in values]
    for name in ("question", "answer"):
        if not isinstance(found[name], str) or not found[name]:
            raise DataError(
                f"{place}: {columns[name]!r} ({name}) is {found[name]!r}; it must be text that is not empty."
            )
    rest = {
        name: v for name, v in found.items() if name not in (*MEDIA_COLUMNS, "question", "answer") and v is not None
    }
    asked = [*content, {"type": "text", "text": found["question"]}]
    return {
        **rest,
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": found["answer"]}]},
        ],
    }


def plain_row(row: Mapping[str, Any], keep_empty: bool = False) -> dict[str, Any]:
    """A row without what tables add: keys that are None because other rows have them, and the shells of stored media.

    `datasets` stores pictures and clips as {"bytes": ..., "path": ...}; the one that is not None is left of that.

    Args:
        keep_empty: columns stay that hold nothing in this row.
    """
    return {name: _plain(value) for name, value in row.items() if keep_empty or value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return {name: _plain(item) for name, item in value.items() if item is not None}
