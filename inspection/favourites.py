"""The words that an expert gets more often than chance would have it.

Shape suffixes: W words, L sparse layers, E experts.
"""

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
    own_share_WLE = choices_WLE / np.maximum(total_WL1, 1)
    texts = [tokenizer.decode([word]) for word in words]

    def favourites_of(layer: int, expert: int) -> list[Favourite]:
        order = np.argsort(-surprise_WLE[:, layer, expert], kind="stable")[:most]
        return [
            Favourite(texts[i], float(own_share_WLE[i, layer, expert]), usage.occurrences[words[i]])
            for i in order
            if surprise_WLE[i, layer, expert] >= MIN_SURPRISE
        ]

    _, layers, experts = choices_WLE.shape
    return [[favourites_of(layer, expert) for expert in range(experts)] for layer in range(layers)]
