"""Data sets, opened: the records of files, folders, `datasets` data sets and the Hub as samples, one after another."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, MissingPackageError
from ..recipe.recipe_data import DataEntry
from .columns import from_columns, plain_row
from .conversations import Sample, sample_reader
from .data_files import files_of
from .hub_data import load_from_hub
from .json_records import Record, read_records, value_of
from .original_data import OriginalRules, VoiceAs

_ROWS_AT_ONCE = 64


class Source:
    """One data set.

    Args:
        entry: which, and how it is read.
        media_root, voice_as: the recipe's, where the entry has none.
        original_rules: of records in LLaVA's form, see `original_data`.
        rows: a data set in memory in place of the entry's path: a `datasets.Dataset` or `IterableDataset`, or anything
            that gives mappings each time it is iterated.

    Raises:
        DataError: there is nothing at the path, or nothing that can be read; the Hub does not give the data set.
    """

    def __init__(
        self,
        entry: DataEntry,
        media_root: str | Path | None = None,
        voice_as: VoiceAs = "speech",
        original_rules: OriginalRules | None = None,
        rows: Any = None,
    ) -> None:
        self.entry, self.name = entry, entry.name
        self.media_root = media_root if entry.media_root is None else entry.media_root
        self._options = (original_rules, entry.voice_as or voice_as)
        self.parts: list[Any]
        if rows is not None:
            self.parts = [rows]
        elif entry.hub is not None:
            self.parts = [load_from_hub(entry)]
        else:
            self.parts = _open_path(Path(entry.path or ""), entry.split)

    @property
    def count(self) -> int | None:
        """Records, where the data set's own header says so."""
        counts = [_count_of(part) for part in self.parts]
        if self._chooses_by_record or None in counts:
            return None
        total = sum(count for count in counts if count is not None)
        return total if self.entry.max_samples is None else min(total, self.entry.max_samples)

    def samples(self, shuffle: np.random.Generator | None = None, tolerant: bool = False) -> Iterator[Sample]:
        """All samples, once, read as they are asked for.

        Args:
            shuffle: of the order of files and of the samples in the entry's buffer; None leaves the order. With
                `max_samples` the files keep their order, so that the samples stay the same.
            tolerant: a record that is broken becomes {"id", "fault": why} in place of an error.

        Raises:
            DataError: a record is broken (named as file:line), or there is not a single sample.
        """
        found = self._in_order(shuffle if self.entry.max_samples is None else None, tolerant)
        found = islice(found, self.entry.max_samples)
        first = next(found, None)
        if first is None:
            raise DataError(
                f"There is not a single sample in {self.name}{self._of_split()}: check it, or leave it out."
            )
        found = chain([first], found)
        yield from found if shuffle is None else _through_buffer(found, self.entry.shuffle_buffer, shuffle)

    def sample_of(self, value: Any, file: Path) -> Sample:
        """The sample of a single record of one of the files. Raises DataError."""
        return sample_reader(file, self.media_root, *self._options)(value, str(file))

    def _in_order(self, shuffle: np.random.Generator | None, tolerant: bool) -> Iterator[Sample]:
        parts: Sequence[Any] = self.parts
        if shuffle is not None and len(parts) > 1:
            parts = [parts[index] for index in shuffle.permutation(len(parts))]
        for part in parts:
            file = part if isinstance(part, Path) else Path(self.entry.path or ".") / "rows"
            read = sample_reader(file, self.media_root, *self._options)
            for record in self._records(part, shuffle):
                try:
                    sample = self._sample(record, read)
                except DataError as error:
                    if not tolerant:
                        raise
                    sample = {"id": record.place, "fault": str(error)}
                if sample is not None:
                    yield sample

    def _records(self, part: Any, shuffle: np.random.Generator | None) -> Iterator[Record]:
        if isinstance(part, Path) and part.suffix != ".parquet":
            yield from read_records(part)
            return
        rows = _parquet_rows(part) if isinstance(part, Path) else _dataset_rows(part, shuffle)
        name = str(part) if isinstance(part, Path) else self.name
        for number, row in enumerate(rows, 1):
            yield Record(number, f"{name}, row {number}", plain_row(row, keep_empty=bool(self.entry.columns)))

    def _sample(self, record: Record, read: Callable[[Any, str], Sample]) -> Sample | None:
        value = value_of(record)
        if self.entry.columns:
            value = from_columns(value, self.entry.columns, record.place)
        if self._chooses_by_record and not (isinstance(value, dict) and value.get("split") == self.entry.split):
            return None
        return read(value, record.place)

    @property
    def _chooses_by_record(self) -> bool:
        return self.entry.split is not None and any(isinstance(part, Path) for part in self.parts)

    def _of_split(self) -> str:
        return "" if self.entry.split is None else f" of the split {self.entry.split!r}"


def _open_path(path: Path, split: str | None) -> list[Any]:
    files = files_of(path)
    if files:
        if any(file.suffix == ".parquet" for file in files):
            _pyarrow()
        return list(files)
    try:
        import datasets
    except ImportError:
        raise MissingPackageError(
            f"{path} was saved by datasets, which reads it: pip install 'unimoe[data]'."
        ) from None
    if not (path / "dataset_dict.json").is_file():
        if split is not None:
            raise DataError(f"The data set in {path} has no splits, but split is {split!r}: leave it out.")
        return [datasets.load_from_disk(str(path))]
    names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if (wanted := split or "train") not in names:
        raise DataError(f"The data set in {path} has no split {wanted!r}: set split to one of {', '.join(names)}.")
    return [datasets.load_from_disk(str(path / wanted))]


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"The data file {file} cannot be read ({error}): is it Parquet, and whole?")


def _dataset_rows(rows: Any, shuffle: np.random.Generator | None) -> Iterable[dict[str, Any]]:
    """The rows with media as they are stored: they are opened where all media are.

    Only streams from the Hub have an order of their own parts to shuffle.
    """
    if hasattr(rows, "with_format") and hasattr(rows, "__getitem__"):
        return (row for table in rows.with_format("arrow").iter(_ROWS_AT_ONCE) for row in table.to_pylist())
    if hasattr(rows, "decode") and rows.features is not None:
        rows = rows.decode(False)
    if shuffle is not None and hasattr(rows, "shuffle"):
        rows = rows.shuffle(seed=int(shuffle.integers(1 << 31)), buffer_size=1)
    return rows


def _count_of(part: Any) -> int | None:
    if not isinstance(part, Path):
        return len(part) if hasattr(part, "__len__") else None
    if part.suffix != ".parquet":
        return None
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.read_metadata(part).num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(part, error) from error


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError("Reading Parquet needs pyarrow: pip install 'unimoe[data]'.") from None
    return pyarrow


def _through_buffer(samples: Iterator[Sample], size: int, shuffle: np.random.Generator) -> Iterator[Sample]:
    """The samples in random order, of which `size` wait at a time."""
    waiting: list[Sample] = []
    for sample in samples:
        if len(waiting) < size:
            waiting.append(sample)
            continue
        place = int(shuffle.integers(size))
        yield waiting[place]
        waiting[place] = sample
    for place in shuffle.permutation(len(waiting)):
        yield waiting[place]
