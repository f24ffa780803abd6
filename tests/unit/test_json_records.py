"""Records that are too long are reported with the limit; reading ends there, in bounded memory."""

import json
from pathlib import Path

import pytest

from unimoe.errors import DataError
from unimoe.trainers.data import json_records
from unimoe.trainers.data.json_records import read_records

LIMIT = "characters that a record may have"


@pytest.fixture(autouse=True)
def short_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", 16)
    monkeypatch.setattr(json_records, "_MAX_RECORD", 64)


def test_a_list_with_a_record_that_does_not_end(tmp_path: Path) -> None:
    (tmp_path / "list").write_text('[1, {"a": "' + "x" * 1000)
    first, last = read_records(tmp_path / "list")
    assert first.value == 1
    assert LIMIT in last.error
    assert last.error.startswith("Unterminated string")
    assert last.position < 500


def test_lines_with_one_that_does_not_end(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"a": 1}\n\n{"b": "' + "x" * 1000 + '"}\n{"c": 1}\n')
    first, last = read_records(tmp_path / "lines")
    assert first.value == {"a": 1}
    assert last.place == f"{tmp_path / 'lines'}:3"
    assert LIMIT in last.error
    assert last.position < 500


def test_a_broken_line_does_not_end_the_reading(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("\n".join(["{}", "{", json.dumps({"n": 3})]))
    records = list(read_records(tmp_path / "lines"))
    assert [record.error is None for record in records] == [True, False, True]
    assert [record.number for record in records] == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b'{"a": 1}\n{"b": "' + "é".encode() * 20 + b'"}\n{"c": "caf\xe9"}\n{"d": 1}\n', 3, "0xe9"),
        (b'[{"a": 1},\n {"b": "\xff"}]', 2, "0xff"),
        ('{"a": 1}\n'.encode("utf-16"), 1, "0xff"),
        (b'{"a": 1}\n{"b": "\xc3', 2, "0xc3"),  # ends within a character
    ],
    ids=["lines", "list", "utf-16", "end"],
)
def test_files_that_are_no_utf_8_name_the_line(tmp_path: Path, content: bytes, line: int, byte: str) -> None:
    (tmp_path / "latin.jsonl").write_bytes(content)
    with pytest.raises(
        DataError, match=rf"latin\.jsonl is not UTF-8 text: line {line} holds the byte {byte}\. Save it"
    ):
        list(read_records(tmp_path / "latin.jsonl"))
