"""Records of a data file, one after another in bounded memory: a JSON list, or JSON lines."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ...errors import DataError

_CHUNK = 1 << 20  # characters
_MAX_RECORD = 1 << 28  # characters; a record that is still open then is taken for broken
_TOO_LONG = f"{_MAX_RECORD:,} characters that a record may have"
_BLANK = " \t\r\n"  # white space of JSON, which is less than Python's


@dataclass(frozen=True)
class Record:
    """One record.

    Fields: `number` counts from 1; `place` names it for messages ("file:line" or "file, record n"); `value` is the
    parsed JSON, or None with the reason in `error`; `position` says how many characters of the file were read.
    """

    number: int
    place: str
    value: Any
    error: str | None = None
    position: int = 0


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file, whichever of the two forms it has.

    A broken line is reported in its record and reading goes on; a broken list, and a line that does not end within
    2^28 characters, end with such a record.

    Raises:
        DataError: the file cannot be opened or is not UTF-8.
    """
    try:
        with file.open(encoding="utf-8-sig") as stream:
            window = _Window(stream)
            if window.peek() == "[":
                yield from _list_records(file, window)
            else:
                yield from _line_records(file, window)
    except UnicodeDecodeError as error:
        line, byte = _first_fault(file)
        raise DataError(
            f"The data file {file} is not UTF-8 text: line {line} holds the byte {byte:#04x}. Save it as UTF-8, e.g. "
            "iconv -f ISO-8859-1 -t UTF-8 (or -f UTF-16, by what wrote it)."
        ) from error
    except OSError as error:
        raise DataError(f"The data file {file} cannot be read ({error.strerror}): check the path.") from error


def _first_fault(file: Path) -> tuple[int, int]:
    """Line, from 1, and value of the first byte that is no UTF-8; reading stopped at a chunk that says neither."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with file.open("rb") as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                return line + before.count(b"\n"), error.object[error.start]


def parsed(records: Iterator[Record]) -> Iterator[Record]:
    """The same records; the first broken one raises a DataError instead."""
    for record in records:
        value_of(record)
        yield record


def value_of(record: Record) -> Any:
    """What a record holds. Raises DataError if it is broken."""
    if record.error is not None:
        raise DataError(f"{record.place} is not JSON ({record.error}): correct or remove it.")
    return record.value


class _Window:
    """The part of a text file that is being looked at."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self.text, self.position, self.dropped = "", 0, 0

    @property
    def total(self) -> int:
        """Characters of the file that have been used."""
        return self.dropped + self.position

    def grow(self) -> bool:
        """Read on, at least doubling what is left to look at; False at the end of the file."""
        left = self.text[self.position :]
        more = self._stream.read(max(_CHUNK, len(left)))
        self.dropped += self.position
        self.text, self.position = left + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next character that is no white space, which is skipped; "" at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _BLANK:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise json.JSONDecodeError(f"{character!r} expected", "", 0)
        self.position += 1

    def value(self) -> Any:
        """The JSON value that starts here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:  # not ValueError: more text does not mend a number that is too long
                if self._is_too_long():
                    raise json.JSONDecodeError(f"{error.msg}, within the {_TOO_LONG}", "", 0) from error
                if not self.grow():
                    raise
                continue
            if end == len(self.text) and self.grow():  # a number may go on
                continue
            self.position = end
            return value

    def lines(self) -> Iterator[str]:
        """The rest of the file, line by line. Raises JSONDecodeError for a line that is too long for a record."""
        while True:
            end = self.text.find("\n", self.position)
            if end < 0:
                if self._is_too_long():
                    raise json.JSONDecodeError(f"no end of line within the {_TOO_LONG}", "", 0)
                if self.grow():
                    continue
            line = self.text[self.position :] if end < 0 else self.text[self.position : end]
            self.position += len(line) + (end >= 0)
            yield line
            if end < 0:
                return

    def _is_too_long(self) -> bool:
        return len(self.text) - self.position > _MAX_RECORD


def _list_records(file: Path, window: _Window) -> Iterator[Record]:
    number = 0
    place = f"{file}, record 1"
    try:
        window.take("[")
        while window.peek() != "]" or number:
            number += 1
            place = f"{file}, record {number}"
            window.peek()
            yield Record(number, place, window.value(), position=window.total)
            if window.peek() == "]":
                break
            window.take(",")
        window.take("]")
        if window.peek():
            raise json.JSONDecodeError("text after the list's end", "", 0)
    except (ValueError, RecursionError) as error:
        yield Record(max(1, number), place, None, _reason(error), window.total)


def _line_records(file: Path, window: _Window) -> Iterator[Record]:
    blank_lines_before = window.text[: window.position].count("\n")
    number = blank_lines_before
    try:
        for line in window.lines():
            number += 1
            if line.strip():
                yield _line_record(file, number, line, window.total)
    except json.JSONDecodeError as error:
        yield Record(number + 1, f"{file}:{number + 1}", None, error.msg, window.total)


def _line_record(file: Path, number: int, line: str, position: int) -> Record:
    place = f"{file}:{number}"
    try:
        return Record(number, place, json.loads(line), position=position)
    except (ValueError, RecursionError) as error:
        return Record(number, place, None, _reason(error), position)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        raise error  # it is of the file, not of the record
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
