"""What a quickstart run was asked for, and where it keeps things."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..starter_corpus.corpus import load_samples
from .evaluate import spread
from .stages import Budget, faster_precision

ATTEMPTS_FILE = "attempts.json"
PRECISION_FILE = "precision.txt"


@dataclass
class Quickstart:
    """One run.

    Args:
        out: folder of the result; `out/work` holds what a killed run goes on from.
        language_model: "default" (SmolLM2), a folder or a Hub id; None makes a compact decoder and teaches it.
        vision_tower, speech_tower: a folder or a Hub id; None takes the defaults of `quickstart.parts`.
        heldout_per_task, training_per_task: use fewer items, for tests.
    """

    out: Path
    seed: int
    budget: Budget
    language_model: str | None = None
    vision_tower: str | None = None
    speech_tower: str | None = None
    heldout_per_task: int | None = None
    training_per_task: int | None = None
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
        samples = load_samples("train")
        return samples if self.training_per_task is None else spread(samples, self.training_per_task)

    def heldout_samples(self) -> list[dict[str, Any]]:
        samples = load_samples("heldout")
        return samples if self.heldout_per_task is None else spread(samples, self.heldout_per_task)
