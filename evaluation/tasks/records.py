"""Official files of any kind as lists of records."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from ...errors import DataError

# Fields of spread-sheets may hold whole pictures as base64.
_MAX_FIELD = 1 << 28


def read_json_value(path: Path) -> Any:
    """The value in a JSON file, or in the only file of a .tar.gz.

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    return _guarded(path, lambda: json.loads(_text(path)))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .json (list, or a mapping with a list under "data" or "questions"), .jsonl, .csv, .tsv or .parquet
    file, or of the only file of a .tar.gz.

    Raises:
        DataError: the file cannot be read, or is of another kind.
    """
    return _guarded(path, lambda: _records(path))


def _guarded(path: Path, read: Any) -> Any:
    try:
        return read()
    except (OSError, UnicodeDecodeError, ValueError, tarfile.TarError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as the official file ({error}): fetch it again.") from error


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix in (".csv", ".tsv"):
        csv.field_size_limit(_MAX_FIELD)
        rows = csv.DictReader(io.StringIO(_text(path)), delimiter="\t" if path.suffix == ".tsv" else ",")
        return [dict(row) for row in rows]
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    text = _text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(value, dict):
        value = next((value[name] for name in ("data", "questions", "annotations") if name in value), [value])
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise ValueError("it holds no list of records")
    return value


def _text(path: Path) -> str:
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            files = [member for member in archive.getmembers() if member.isfile()]
            stream = archive.extractfile(files[0]) if len(files) == 1 else None
            if stream is None:
                raise ValueError(f"it holds {len(files)} files, not one")
            return stream.read().decode("utf-8-sig")
    return path.read_text(encoding="utf-8-sig")
