"""The starter corpus's held-out items, and conversations of one's own: the tasks that need no download."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import scoring
from .item import Item
from .prompts import BARE
from .task import Task

MODALITIES = {
    "image": "image",
    "speech": "speech",
    "sound": "sound",
    "video_direction": "video",
    "video_object": "video",
    "text": "text",
}
_LONGEST_ANSWER = 12  # tokens, as in the quickstart


def item_of_sample(sample: Mapping[str, Any]) -> Item:
    """A sample of our data format; its last message is the answer, and its clip or picture stands for the cluster."""
    content = sample["messages"][0]["content"]
    texts = [item["text"] for item in content if item["type"] == "text"]
    media = tuple((item["type"], Path(item["path"])) for item in content if item["type"] != "text")
    answer = "".join(item["text"] for item in sample["messages"][-1]["content"]).strip()
    return Item(sample["id"], "".join(texts), answer, media, category=sample["task"], cluster="", record=sample)


def _reader(task: str) -> Callable[[Mapping[str, Path]], list[Item]]:
    def read(files: Mapping[str, Path]) -> list[Item]:
        from ...starter_corpus.corpus import load_samples

        return [item_of_sample(sample) for sample in load_samples("heldout") if sample["task"] == task]

    return read


def _chance(task: str) -> Callable[[Any], float]:
    """One in as many answers as the task has in training and held-out part: the quickstart's figure."""

    def chance(items: Any) -> float:
        from ...starter_corpus.corpus import load_samples

        samples = [*load_samples("train"), *load_samples("heldout")]
        return 100 / len({item_of_sample(sample).answer for sample in samples if sample["task"] == task})

    return chance


STARTER_TASKS = [
    Task(
        name=f"starter_{task}",
        title=f"Starter corpus, {task.replace('_', ' ')}",
        modality=modality,
        split="heldout",
        files={},
        read=_reader(task),
        prompts={"": BARE},
        score=scoring.exact,
        chance=_chance(task),
        max_new_tokens=_LONGEST_ANSWER,
        extraction="the whole text, without blanks around it",
    )
    for task, modality in MODALITIES.items()
]
