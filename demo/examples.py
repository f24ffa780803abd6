"""Questions to begin with: items of the starter corpus that the quickstart model has not been trained on."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..starter_corpus.corpus import Sample, load_samples

# An item of the corpus, what the model must take for it, and how the page calls it.
_ITEMS = (
    ("image-rocket-openmoji-0", "image", "A picture"),
    ("speech-penguin_flite-awb", "speech", "A spoken word"),
    ("sound-piano-fluid-p200-piano-a-7", "sound", "A sound"),
    ("video_direction-heldout000_cat_left", "video", "A video"),
    ("text-horse-0", "text", "Only text"),
)


@dataclass(frozen=True)
class Example:
    """Something to ask: its title, question and media."""

    title: str
    text: str
    files: list[str]


def examples_for(modalities: Sequence[str], folder: Path) -> list[Example]:
    """One for each of the modalities, its media copied into a folder."""
    samples = {sample["id"]: sample for sample in load_samples("heldout")}
    return [_example(title, samples[name], folder) for name, modality, title in _ITEMS if modality in modalities]


def _example(title: str, sample: Sample, folder: Path) -> Example:
    items = sample["messages"][0]["content"]
    text = " ".join(item["text"] for item in items if item["type"] == "text")
    files = [Path(item["path"]) for item in items if item["type"] != "text"]
    return Example(title, text, [str(shutil.copy(file, folder / file.name)) for file in files])
