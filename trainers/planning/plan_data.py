"""What a recipe's data hold, from their headers and some of their samples."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import ConversationError, DataError, MediaError, PlaceholderError
from ..data.collator import RowRules, TokenRows
from ..data.conversations import Sample, group_of, media_items
from ..data.data_sources import Source
from ..recipe.recipe_data import DataEntry
from ..steps.objective import IGNORED

_WHOLE = 8 << 20  # bytes; files up to this size are read, of larger ones some places
_PLACES = 64
_PER_PLACE = 8
_TOKENISED = 48  # samples of each group
_FAULTS = (ConversationError, DataError, MediaError, PlaceholderError)


@dataclass(frozen=True)
class DataSetHeader:
    """A data set, looked at: some of its samples, and how many it has, None where nobody knows.

    exact: whether all samples were read.
    """

    entry: DataEntry
    samples: list[Sample]
    count: float | None
    exact: bool


@dataclass(frozen=True)
class GroupEstimate:
    """Samples that share batches: their share of all that are drawn, and of those that were tokenised the mean number
    of tokens, the most, the most of them that go through the head, media per sample by kind, and faults.

    names: the group's own, its task and its modality.
    """

    names: tuple[str, str, str]
    share: float
    tokens: float
    longest: int
    logits_length: int
    media: dict[str, float]
    looked_at: int
    faults: list[str]


def look_at(entry: DataEntry, media_root: str | None, voice_as: Any) -> DataSetHeader | None:
    """The header of a data set; None for those of the Hub, which is not asked for a plan.

    Raises:
        DataError: it is not there, is empty or cannot be read.
    """
    if entry.hub is not None:
        return None
    source = Source(entry, media_root, voice_as)
    files = [part for part in source.parts if isinstance(part, Path)]
    size = sum(file.stat().st_size for file in files)
    if size <= _WHOLE and source.count is None:
        samples = list(source.samples(tolerant=True))
        return DataSetHeader(entry, [s for s in samples if "fault" not in s], len(samples), True)
    lined = [file for file in files if file.suffix == ".jsonl"]
    if source.count is None and len(lined) == len(files) and entry.split is None and not entry.columns:
        found = list(_spread(source, lined))
        if found:
            bytes_each = sum(length for _, length in found) / len(found)
            count = min(size / bytes_each, entry.max_samples or size)
            return DataSetHeader(entry, [sample for sample, _ in found], count, False)
    head = [s for s in islice(source.samples(tolerant=True), _PLACES * _PER_PLACE) if "fault" not in s]
    return DataSetHeader(entry, head, source.count, False)


def chosen_count(headers: Sequence[DataSetHeader], names: Sequence[str]) -> float | None:
    """How many samples of the modalities or tasks the data sets have; None where one does not tell its size."""
    total = 0.0
    for header in headers:
        if header.count is None:
            return None
        total += header.count * len(_chosen(header, names)) / max(1, len(header.samples))
    return total


def _chosen(header: DataSetHeader, names: Sequence[str]) -> list[Sample]:
    return [s for s in header.samples if not names or {s["modality"], s["task"], group_of(s)} & set(names)]


def groups_of(
    headers: Sequence[DataSetHeader], names: Sequence[str], processor: Any, rules: RowRules
) -> list[GroupEstimate]:
    """The groups of a stage's data.

    Args:
        names: the stage's `modalities`.
        rules: of its rows; samples that are too long for them are faults.
    """
    chosen: dict[str, list[Sample]] = {}
    weight: dict[str, float] = {}
    weighted = all(header.entry.weight is not None for header in headers)
    for header in headers:
        own = _chosen(header, names)
        among = len(own) if weighted else len(header.samples)
        whole = header.entry.weight if weighted else header.count
        for sample in own:
            group = group_of(sample)
            chosen.setdefault(group, []).append(sample)
            weight[group] = weight.get(group, 0.0) + (1.0 if whole is None else whole) / max(1, among)
    if not chosen:
        raise DataError(f"The data have no samples of {', '.join(names)}." if names else "The data have no samples.")
    total = sum(weight.values())
    tokens = TokenRows(processor)
    return [_estimate(name, weight[name] / total, own, tokens, rules) for name, own in chosen.items()]


def _estimate(name: str, share: float, samples: list[Sample], tokens: TokenRows, rules: RowRules) -> GroupEstimate:
    lengths, columns, faults = [], [], []
    some = samples[:: max(1, len(samples) // _TOKENISED)]
    media: dict[str, float] = {}
    for sample in some:
        items = list(media_items(sample))
        for item in items:
            media[item["type"]] = media.get(item["type"], 0.0) + 1 / len(some)
        try:
            windows = [1 for item in items if item["type"] == "audio"]
            ids, labels = rules.applied(sample, tokens.row(sample, () if "text" in sample else windows))
        except _FAULTS as error:
            faults.append(str(error))
            continue
        lengths.append(len(ids))
        columns.append(len(ids) - next((i for i, label in enumerate(labels) if label != IGNORED), len(ids)) + 1)
    mean = sum(lengths) / max(1, len(lengths))
    names = (name, some[0]["task"], some[0]["modality"])
    return GroupEstimate(
        names, share, mean, max(lengths, default=0), max(columns, default=0), media, len(some), faults
    )


def _spread(source: Source, files: Sequence[Path]) -> Iterator[tuple[Sample, int]]:
    """Samples from places all over the files, each with the bytes of its line; lines that are broken are left out."""
    total = sum(file.stat().st_size for file in files)
    for file in files:
        size = file.stat().st_size
        places = max(1, round(_PLACES * size / total))
        with file.open("rb") as stream:
            for place in range(places):
                stream.seek(size * place // places, os.SEEK_SET)
                if place:
                    stream.readline()  # the rest of a line
                for line in islice(stream, _PER_PLACE):
                    try:
                        yield source.sample_of(json.loads(line), file), len(line)
                    except (ValueError, DataError):
                        continue
