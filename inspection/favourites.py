"""The words that an expert gets more often than chance would have it."""

import math
from typing import Any, NamedTuple

import numpy as np

from .usage import Usage

# Rarer words say too little.
MIN_OCCURRENCES = 5
# In standard deviations of a random assignment; smaller surprises are left out.
MIN_SURPRISE = 3.0


class Favourite(NamedTuple):
    """A text token, the share of its choices that one expert got, and how often it occurred."""

    text: str
    share: float
    occurrences: int


def favourite_words(usage: Usage, tokenizer: Any, most: int = 8) -> list[list[list[Favourite]]]:
    """The most surprising words of every expert, [layers][experts], best first.

    A word's surprise is by how many standard deviations the number of its choices of an expert exceeds what the expert's
    share of all words' choices leads to expect.
    """
    words = [word for word, count in usage.occurrences.items() if count >= MIN_OCCURRENCES]
    if not words:
        return [[] for _ in usage.layers]
    choices_WLE = np.stack([usage.words[word] for word in words]).astype(np.float64)
    share_LE = sum(usage.words.values()).astype(np.float64)
    share_LE = share_LE / np.maximum(share_LE.sum(axis=-1, keepdims=True), 1)
    total_WL1 = choices_WLE.sum(axis=-1, keepdims=True)
    deviation_WLE = np.sqrt(total_WL1 * share_LE * (1 - share_LE)) + 1e-9
    surprise_WLE = (choices_WLE - total_WL1 * share_LE) / deviation_WLE
    texts = [tokenizer.decode([word]) for word in words]
    found = []
    for layer in range(choices_WLE.shape[1]):
        row = []
        for expert in range(choices_WLE.shape[2]):
            order = np.argsort(-surprise_WLE[:, layer, expert], kind="stable")[:most]
            best = [index for index in order if surprise_WLE[index, layer, expert] >= MIN_SURPRISE]
            row.append([_favourite(texts, usage, words, choices_WLE, total_WL1, i, layer, expert) for i in best])
        found.append(row)
    return found


def _favourite(
    texts: list[str],
    usage: Usage,
    words: list[int],
    choices_WLE: np.ndarray,
    total_WL1: np.ndarray,
    index: int,
    layer: int,
    expert: int,
) -> Favourite:
    share = choices_WLE[index, layer, expert] / max(1.0, total_WL1[index, layer, 0])
    return Favourite(texts[index], share if math.isfinite(share) else 0.0, usage.occurrences[words[index]])
