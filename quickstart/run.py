"""What a quickstart run was asked for, and where it keeps things."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..starter_corpus.corpus import corpus_root, load_samples
from ..trainers.data import ConversationDataset
from .precision import faster_precision
from .schedule import Budget

ATTEMPTS_FILE = "attempts.json"
PRECISION_FILE = "precision.txt"


@dataclass
class Quickstart:
    """One run.

    Args:
        out: folder of the result; `out/work` holds what a killed run goes on from.
        language_model: "default" (SmolLM2), a folder or a Hub id; None makes a compact decoder and teaches it.
        vision_tower, speech_tower: a folder or a Hub id; None takes the defaults of `quickstart.parts`.
        compare: also train a dense model equally long, after everything else.
        words: use only items about these concepts (and all sounds); None uses everything.
    """

    out: Path
    seed: int
    budget: Budget
    language_model: str | None = None
    vision_tower: str | None = None
    speech_tower: str | None = None
    compare: bool = False
    words: tuple[str, ...] | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def total_seconds(self) -> float:
        """Seconds of this attempt and of the killed ones before it."""
        return sum(self._earlier_attempts()) + self.seconds

    @contextmanager
    def counted_attempt(self) -> Iterator[None]:
        """Remember how long this attempt took, however it ends short of a kill."""
        try:
            yield
        finally:
            attempts = [*self._earlier_attempts(), self.seconds]
            (self.work / ATTEMPTS_FILE).write_text(json.dumps(attempts), encoding="utf-8")

    def _earlier_attempts(self) -> list[float]:
        file = self.work / ATTEMPTS_FILE
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

    def precision(self) -> str:
        """Precision of the matrix products in training: measured once, kept for attempts that go on."""
        file = self.work / PRECISION_FILE
        if not file.is_file():
            file.write_text(faster_precision(), encoding="utf-8")
        return file.read_text(encoding="utf-8")

    def say(self, text: str) -> None:
        print(f"[{self.seconds:5.0f} s] {text}", flush=True)

    def training_samples(self) -> list[dict[str, Any]]:
        return self._chosen(load_samples("train"))

    def heldout_samples(self) -> list[dict[str, Any]]:
        return self._chosen(load_samples("heldout"))

    def language_dataset(self) -> ConversationDataset:
        """What stage 0 learns: plain English, questions about described media, text questions."""
        everything = ConversationDataset([str(corpus_root() / "stage0.jsonl")])
        return everything if self.words is None else ConversationDataset.from_samples(self._chosen(everything.samples))

    def _chosen(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.words is None:
            return samples
        return [sample for sample in samples if sample["task"] == "sound" or set(self.words) & _words_of(sample)]


def _words_of(sample: dict[str, Any]) -> set[str]:
    """All words of a sample's texts and of its media files' names."""
    texts = [sample.get("text", "")]
    for message in sample.get("messages", []):
        for item in message["content"]:
            texts.append(item["text"] if item["type"] == "text" else Path(item["path"]).stem)
    return set(re.findall(r"[a-z]+", " ".join(texts).lower()))
