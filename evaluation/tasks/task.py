"""A benchmark as one declarative entry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..metrics.scores import Scores
from .data_folder import DataFolder
from .item import Item
from .prompts import prompt_text

Texts = Mapping[Any, str]
Score = Callable[[Sequence[Item], Texts], Scores]
ScoredBy = Literal["here", "server", "judge"]


@dataclass(frozen=True)
class Statistic:
    """How a total comes from sums over items, so that intervals can be had by drawing items again.

    Fields:
        counts: (item, its row of the scores) -> numbers that add up over items.
        value: their sums [..., k] -> the total [...].
    """

    counts: Callable[[Item, Mapping[str, Any]], Sequence[float]]
    value: Callable[[Any], Any]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Fields:
        name, title: on the command line, and for people.
        modality: what the model has to take in: "image", "speech", "sound", "video" or "text".
        split: of the official data.
        files: role -> file names of which one must be there; wildcards may be used.
        read: role -> path of the file found, to the items.
        prompts: system -> template of `prompts`; "" is for all others.
        score: items and texts by id -> scores; None where only a server or a judge can tell.
        scored_by: who computes the published number.
        submission: the file that a server or an external grader takes, see `submissions`.
        statistic: how totals add up; None: the mean of the rows' scores, in the unit of the total.
        chance: what guessing reaches, in the unit of the total.
        lower_is_better: of error rates, for which no single answer is a fair guess.
        max_new_tokens: longest answer; `limits` says where a system's own differs.
        systems: whose evaluation lists the task is on.
        source: where the files come from, for the message when they are missing.
        media_source: the same for pictures, recordings and videos.
        extraction: in words, how an answer is found in the text.
    """

    name: str
    title: str
    modality: str
    split: str
    files: Mapping[str, tuple[str, ...]]
    read: Callable[[Mapping[str, Path]], list[Item]]
    prompts: Mapping[str, str]
    score: Score | None = None
    scored_by: ScoredBy = "here"
    submission: str | None = None
    statistic: Statistic | None = None
    chance: Callable[[Sequence[Item]], float] | None = None
    lower_is_better: bool = False
    max_new_tokens: int = 128
    limits: Mapping[str, int] = field(default_factory=dict)
    systems: tuple[str, ...] = ()
    source: str = ""
    media_source: str = ""
    extraction: str = ""

    def items(self, data: Path) -> list[Item]:
        """The questions.

        Raises:
            DataError: an official file is missing or unreadable.
        """
        folder = DataFolder(data, self.name)
        return self.read({role: folder.need(names, self.source) for role, names in self.files.items()})

    def template(self, system: str) -> str:
        """The wording of a system's prompts."""
        return self.prompts.get(system, self.prompts[""])

    def prompt(self, item: Item, system: str) -> str:
        """The text that goes with an item's media."""
        return prompt_text(item, item.template or self.template(system))

    def longest_answer(self, system: str) -> int:
        """In tokens."""
        return self.limits.get(system, self.max_new_tokens)
