"""Looks through a data file before any training: what is missing, unreadable or inconsistent, and how often."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import ConversationError, DataError, MediaError
from ...processing.chat_unimoe import read_messages
from ...processing.media_audio_unimoe import load_audio
from ...processing.media_policy_unimoe import DEFAULT_POLICY, MediaPolicy
from ...processing.media_unimoe import load_image
from ...processing.media_video_unimoe import load_video
from .conversations import MEDIA_KINDS, Sample, media_items, media_value, paths_of, sample_reader
from .json_records import Record, read_records
from .original_data import is_original

_SECONDS_BEFORE_A_BAR = 3.0
_SAME_ID = "the id of an earlier record"


@dataclass
class Finding:
    """One kind of problem or remark: how many items have it, and the first of them.

    Fields: `what` is "image", "video", "audio" or "record", of remarks their text; `fault` is "missing", "unreadable" or
    "inconsistent", of remarks empty; `record` counts from 1 (of JSON lines it is the line).
    """

    what: str
    fault: str
    count: int
    record: int
    id: str
    detail: str


@dataclass
class DataReport:
    """What a data file holds.

    Fields: `records` and `media` (by kind, with repetitions) that were looked at; `original` says whether records have
    LLaVA's form; `problems` and `remarks` by kind, in the order in which they first occur; `cases`, if they were asked
    for, every single one as ("problem" or "remark", it), in order.
    """

    records: int = 0
    media: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEDIA_KINDS, 0))
    original: bool = False
    problems: list[Finding] = field(default_factory=list)
    remarks: list[Finding] = field(default_factory=list)
    cases: list[tuple[str, Finding]] = field(default_factory=list)


def check_data(
    file: str | Path,
    media_root: str | Path | None = None,
    limit: int | None = None,
    progress: bool = True,
    keep_cases: bool = False,
) -> DataReport:
    """Read every record and decode every medium of a data file once, in our format or in LLaVA's.

    Args:
        media_root: the folder that holds the media; nothing outside of it is opened then. See `MediaPaths`.
        limit: look at so many records only.
        progress: show a bar if it takes longer than 3 seconds.
        keep_cases: fill `DataReport.cases`, in place of the first of each kind only.

    Raises:
        DataError: the file cannot be read at all.
    """
    file = Path(file)
    policy = DEFAULT_POLICY
    if media_root is not None:
        if not Path(media_root).is_dir():
            raise DataError(f"media_root {media_root} is no folder: give the one that holds the media.")
        policy = dataclasses.replace(policy, media_root=str(Path(media_root).absolute()))
    checker = _Checker(policy, keep_cases)
    read = sample_reader(file, media_root)
    for record in _with_bar(islice(read_records(file), limit), file, progress):
        checker.look_at(record, read)
    report = checker.report
    if not report.records:
        report.problems.append(Finding("record", "missing", 1, 1, "", "there is not a single record"))
    return report


class _Checker:
    """Collects what is found. A medium is opened once, however many records name it."""

    def __init__(self, policy: MediaPolicy, keep_cases: bool) -> None:
        self.report = DataReport()
        self._policy = policy
        self._keep_cases = keep_cases
        self._ids: set[str] = set()
        self._seen: dict[tuple[str, Any], tuple[str, str] | None] = {}

    def look_at(self, record: Record, read: Callable[[Any, str], Sample]) -> None:
        self.report.records += 1
        if record.error is not None:
            self._note("problem", "record", "unreadable", record, "", f"not JSON ({record.error})")
            return
        self.report.original |= is_original(record.value)
        name = str(record.value.get("id", "")) if isinstance(record.value, dict) else ""
        if name in self._ids:
            self._note("remark", _SAME_ID, "", record, name, "")
        if name:
            self._ids.add(name)
        try:
            sample = read(record.value, record.place)
            if "messages" in sample:
                read_messages(sample["messages"], self._policy.limits)
        except (DataError, ConversationError, MediaError) as error:
            reason = str(error).removeprefix(record.place).lstrip(": ")
            self._note("problem", "record", "inconsistent", record, name, reason)
            return
        for remark in sample.get("remarks", ()):
            self._note("remark", remark, "", record, name, "")
        self._look_at_media(sample, record, name)

    def _look_at_media(self, sample: Sample, record: Record, name: str) -> None:
        for item in media_items(sample):
            kind, value = item["type"], media_value(item)
            self.report.media[kind] += 1
            key = (kind, value if isinstance(value, str | bytes) else repr(value))
            if key not in self._seen:
                self._seen[key] = self._fault_of(kind, value)
            found = self._seen[key]
            if found is not None:
                self._note("problem", kind, found[0], record, name, found[1])

    def _fault_of(self, kind: str, value: Any) -> tuple[str, str] | None:
        """Fault and detail as in a `Finding`, or None."""
        paths = paths_of(value)
        for path in paths:
            if not os.path.exists(path):
                return "missing", path
        try:
            if kind == "image":
                load_image(value, self._policy)
            elif kind == "audio":
                load_audio(value, 16_000, policy=self._policy)
            elif isinstance(value, list):
                load_video(value, max(1, len(value)), policy=self._policy)
            else:
                load_video(value, policy=self._policy)
        except ImportError as error:
            raise DataError(str(error)) from error
        except MediaError as error:
            return "unreadable", f"{paths[0] if paths else 'given in the record'}: {error.reason}"
        return None

    def _note(self, sort: str, what: str, fault: str, record: Record, name: str, detail: str) -> None:
        case = Finding(what, fault, 1, record.number, name, detail)
        if self._keep_cases:
            self.report.cases.append((sort, dataclasses.replace(case)))
        findings = self.report.problems if sort == "problem" else self.report.remarks
        for finding in findings:
            if (finding.what, finding.fault) == (what, fault):
                finding.count += 1
                return
        findings.append(case)


def _with_bar(records: Iterator[Record], file: Path, progress: bool) -> Iterator[Record]:
    size = file.stat().st_size if file.is_file() else 0
    with tqdm(
        total=size,
        desc="Checking",
        unit="B",
        unit_scale=True,
        delay=_SECONDS_BEFORE_A_BAR,
        leave=False,
        disable=not progress,
    ) as bar:
        for record in records:
            yield record
            bar.update(record.position - bar.n)
