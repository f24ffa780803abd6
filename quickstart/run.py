"""What a quickstart run was asked for, and where it keeps things."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..starter_corpus.corpus import corpus_root, load_samples
from ..trainers.data.conversations import ConversationDataset
from ..trainers.saving.checkpoints import write_durably
from ..trainers.saving.folder_lock import exclusive
from .parts import Part
from .precision import faster_precision
from .schedule import Budget

SETTINGS_FILE = "run.json"
ATTEMPTS_FILE = "attempts.json"
PRECISION_FILE = "precision.txt"
METRICS_FILE = "metrics.json"
LARGEST_SEED = 2**32 - 1


@dataclass
class Quickstart:
    """One run.

    Args:
        out: folder of the result; `out/work` holds what a killed run goes on from.
        language_model: "default" (SmolLM2), a folder or a Hub id; None makes a compact decoder and teaches it.
        vision_tower, speech_tower: a folder or a Hub id; None takes the defaults of `quickstart.parts`.
        compare: also train a dense model equally long, after everything else.
        words: use only items about these concepts (and all sounds); None uses everything.

    Raises:
        RecipeError: the seed is out of range.
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
    earlier_attempts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise RecipeError(f"--seed is {self.seed}; it must be between 0 and {LARGEST_SEED}.")

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def total_seconds(self) -> float:
        """Seconds of this attempt and of those before it, up to the last thing that each of them said."""
        return sum(self.earlier_attempts) + self.seconds

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Hold the output folder for this process alone, and keep count of the time.

        Raises:
            RecipeError: `out` cannot be written.
            CheckpointError: another process is at work in it.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"--out {self.out} cannot be used ({error}): name a folder that can be written."
            ) from error
        with exclusive(self.work):
            for abandoned in self.out.glob(".model-*"):  # by a process that was killed while it saved
                shutil.rmtree(abandoned, ignore_errors=True)
            self.earlier_attempts = _read_json(self.work / ATTEMPTS_FILE) or []
            try:
                yield
            finally:
                self.note_time()

    def note_time(self) -> None:
        """Remember how long this attempt has taken so far, for the attempt after a kill."""
        write_durably(self.work / ATTEMPTS_FILE, json.dumps([*self.earlier_attempts, self.seconds]))

    def require_same_run(self, parts: list[Part]) -> None:
        """Refuse to go on from what a run of other settings left.

        Raises:
            RecipeError: a setting differs; the message names the option.
        """
        budget = {name: value for name, value in vars(self.budget).items() if name != "seconds"}
        now = {"--seed": self.seed, "--minutes": budget, "words": self.words and sorted(self.words)}
        now |= {f"--{part.role}": part.digest for part in parts}
        now = json.loads(json.dumps(now))
        then = _read_json(self.work / SETTINGS_FILE)
        if then is None:
            write_durably(self.work / SETTINGS_FILE, json.dumps(now, indent=1))
            return
        for option in sorted({*now, *then}):
            if now.get(option) != then.get(option):
                raise RecipeError(
                    f"{self.out} holds a run with another {option} ({then.get(option)}, now {now.get(option)}): go on "
                    "with that one, or name another --out."
                )

    def finished_metrics(self) -> dict[str, Any] | None:
        """metrics.json of an attempt that reached the end, with its model and report; None before that."""
        whole = all((self.out / name).is_file() for name in ("model/config.json", "report.html"))
        return _read_json(self.out / METRICS_FILE) if whole else None

    def precision(self) -> str:
        """Precision of the matrix products in training: measured once, kept for attempts that go on."""
        file = self.work / PRECISION_FILE
        if not file.is_file():
            write_durably(file, faster_precision())
        return file.read_text(encoding="utf-8")

    def say(self, text: str) -> None:
        """A line on screen with the seconds since the start; the time counts from now on, whatever happens."""
        self.note_time()
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


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _words_of(sample: dict[str, Any]) -> set[str]:
    """All words of a sample's texts and of its media files' names."""
    texts = [sample.get("text", "")]
    for message in sample.get("messages", []):
        for item in message["content"]:
            texts.append(item["text"] if item["type"] == "text" else Path(item["path"]).stem)
    return set(re.findall(r"[a-z]+", " ".join(texts).lower()))
