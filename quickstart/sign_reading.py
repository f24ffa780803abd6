"""Signs to read with a quickstart's model: words that it can write, their pictures, and what OCR reads in them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..processing.perception.interface import Reader
from ..processing.perception.perceiver import Perceiver
from ..processing.perception.verbalize import TEXTS
from ..starter_corpus.corpus import corpus_root
from ..trainers.caches.perceive_data import carry_out, open_cache, plan_perception
from ..trainers.caches.perception_cache import PerceptionCache
from ..trainers.data.conversations import Sample, read_samples
from .sign_data import WORDS, SignOptions, build_signs

# The sentence that stands in every picture's place when nothing may be told of it.
UNTOLD = TEXTS.strip().rstrip(":") + "."
_SHORTEST = 3


@dataclass(frozen=True)
class SignCounts:
    """Pictures: to train on, of the same words to test with, and of words that are in neither."""

    train: int = 1800
    known: int = 150
    unseen: int = 300


@dataclass(frozen=True)
class SignTest:
    """What is trained on and asked; every sample's image carries what OCR read as "aux".

    Fields: `train`; `tests` by name, in the order of a table; `cache` of what was seen.
    """

    train: list[Sample]
    tests: dict[str, list[Sample]]
    cache: PerceptionCache

    @property
    def trained_words(self) -> list[str]:
        return sorted({sample["source"]["word"] for sample in self.train})

    @property
    def unseen_words(self) -> set[str]:
        tested = {sample["source"]["word"] for samples in self.tests.values() for sample in samples}
        return tested.difference(self.trained_words)


def words_to_read(tokenizer: Any) -> tuple[str, ...]:
    """Words for signs: `sign_data`'s, and those words of the quickstart's English that its tokenizer has as one token."""
    text = (corpus_root() / "stage0.jsonl").read_text(encoding="utf-8")
    known = sorted(set(re.findall(rf"\b[a-z]{{{_SHORTEST},}}\b", text)))
    return tuple(dict.fromkeys((*WORDS, *(word for word in known if is_one_token(tokenizer, word)))))


def is_one_token(tokenizer: Any, word: str) -> bool:
    """Whether an answer that is this word is a single token; the chat template puts a space before it."""
    return len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1


def draw_signs(folder: Path, tokenizer: Any, counts: SignCounts, options: SignOptions) -> None:
    """Pictures of `words_to_read`, in lower case, which is how that English is written; drawn once per folder."""
    files = [folder / f"{split}.jsonl" for split in ("train", "heldout")]
    if not all(file.is_file() for file in files):
        words = words_to_read(tokenizer)
        options = replace(options, train=counts.train + counts.known, heldout=counts.unseen)
        build_signs(folder, replace(options, words=words, cases=("lower",)))


def sign_test(
    folder: Path,
    seen: Path,
    tokenizer: Any,
    counts: SignCounts,
    reader: Reader,
    more: Mapping[str, Sequence[Sample]] | None = None,
) -> SignTest:
    """The samples that were drawn, with what a reader reads in their pictures; read once per cache `seen`.

    Args:
        more: tests with other pictures, by name.
    """
    drawn = {split: list(read_samples(folder / f"{split}.jsonl")) for split in ("train", "heldout")}
    drawn |= {name: list(samples) for name, samples in (more or {}).items()}
    perceiver = Perceiver(reader=reader)
    cache = open_cache(seen, perceiver)
    everything = [sample for samples in drawn.values() for sample in samples]
    carry_out(plan_perception(everything, cache), perceiver, cache, progress=False)
    told = {split: [cache.with_aux(sample, with_map=False) for sample in samples] for split, samples in drawn.items()}
    one = [is_one_token(tokenizer, sample["source"]["word"]) for sample in told["heldout"]]
    tests = {
        "trained words": told["train"][counts.train :],
        "unseen words of one token": [s for s, single in zip(told["heldout"], one, strict=True) if single],
        "unseen words of several": [s for s, single in zip(told["heldout"], one, strict=True) if not single],
        **{name: told[name] for name in more or {}},
    }
    return SignTest(told["train"][: counts.train], {name: some for name, some in tests.items() if some}, cache)


def untold(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, with one and the same sentence for every picture in place of what was read."""
    return [json.loads(json.dumps(sample), object_hook=_untold_item) for sample in samples]


def _untold_item(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "aux": {"text": UNTOLD}} if item.get("type") == "image" else item
