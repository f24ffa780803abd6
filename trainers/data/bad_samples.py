"""Samples that turn out to be unreadable while a model trains: left out, counted, listed; too many of them end the run.

A batch that loses samples is smaller; nothing takes their place. What a run left out is in `FILE`, one JSON line per
sample with its id and the reason.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...errors import ConversationError, DataError, MediaError, PlaceholderError
from ..parallel.ranks import is_first, of_first
from ..saving.checkpoints import append_line
from ..steps.objective import IGNORED
from .conversations import ConversationDataset, Sample, group_of

logger = logging.get_logger(__name__)

# How far, in standard deviations, the samples met so far must be above the limit to end a run before its data are known.
_DEVIATIONS = 4

FILE = "bad_samples.jsonl"
# Faults of a sample. Whatever else goes wrong is a fault of the run and ends it.
_FAULTS = (MediaError, PlaceholderError, ConversationError, DataError)


class TolerantCollator:
    """Makes batches of the samples that another collator can read; `bad_samples` of a batch are (id, reason) pairs.

    A batch of unreadable samples only becomes one token from which nothing is learned, so that every rank of a parallel
    run still takes part in the step.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def fit(self, dataset: ConversationDataset) -> None:
        self.collator.fit(dataset)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        try:
            return self.collator(samples)
        except _FAULTS:
            readable, bad = self._sorted(samples)
        batch = self.collator(readable) if readable else self._empty(samples)
        return batch | {"bad_samples": bad}

    def _sorted(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[tuple[str, str]]]:
        readable, bad = [], []
        for sample in samples:
            try:
                self.collator([sample])
            except _FAULTS as error:
                bad.append((str(sample["id"]), f"{type(error).__name__}: {error}"))
            else:
                readable.append(sample)
        if not bad:
            raise DataError(
                f"The samples {[sample['id'] for sample in samples]} can be read one by one, but not as a batch: give "
                "those of unlike content different tasks, or train with batch_size 1."
            )
        return readable, bad

    def _empty(self, samples: Sequence[Sample]) -> dict[str, Any]:
        tokenizer = self.collator.processor.tokenizer
        row = {"input_ids": [tokenizer.eos_token_id or 0], "labels": [IGNORED]}
        batch = self.collator.processor.pad_tokens([row], "left", 1, length=1)
        return {**batch, "logits_to_keep": 1, "sample_ids": [], "group": group_of(samples[0])}


class BadSamples:
    """The list of a run, alike on all ranks; the first writes it.

    Args:
        folder: gets `FILE`; what is listed there already counts.
        total: samples of the data set.
        limit: share of them that may be bad.
    """

    def __init__(self, folder: Path, total: int, limit: float) -> None:
        self.file, self.total, self.limit = folder / FILE, total, limit
        self.reasons: dict[str, str] = of_first(_listed(self.file) if is_first() else {})
        self._seen = self._seen_bad = 0  # since this start

    def note(self, bad: Iterable[tuple[str, str]], readable: int = 0) -> None:
        """List samples that were left out, of all ranks on every rank. Raises DataError when they have become too many.

        Args:
            readable: samples that came with them and could be read. Where far more of the samples so far are bad than are
                allowed, the run ends before it has met so many that they are too many of the whole.
        """
        for name, reason in bad:
            self._seen += 1
            if name in self.reasons:
                continue
            self._seen_bad += 1
            self.reasons[name] = reason
            if is_first():
                logger.warning(f"The sample {name} is left out: {reason}")
                append_line(self.file, json.dumps({"id": name, "reason": reason}, ensure_ascii=False))
        self._seen += readable
        if len(self.reasons) > self.limit * self.total:
            raise self._too_many(f"{len(self.reasons)} of {self.total} samples")
        expected = self.limit * self._seen
        if self._seen_bad > expected + _DEVIATIONS * math.sqrt(expected) + _DEVIATIONS:
            raise self._too_many(f"{self._seen_bad} of the first {self._seen} samples")

    def _too_many(self, which: str) -> DataError:
        name, reason = next(iter(self.reasons.items()))
        return DataError(
            f"{which} cannot be read, more than max_bad_samples allows ({self.limit:g} of them); they are listed in "
            f"{self.file}. The first: {name}: {reason.rstrip('.')}. Repair or remove them, or raise max_bad_samples."
        )


def _listed(file: Path) -> dict[str, str]:
    """What an earlier start has listed: id -> reason."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    text = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
    file.write_text(text, encoding="utf-8")
    return {record["id"]: record["reason"] for record in map(json.loads, text.splitlines())}
