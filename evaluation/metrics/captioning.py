"""Captions against several references: CIDEr, BLEU and ROUGE-L.

BLEU is sacrebleu's and ROUGE-L rouge-score's. No kept package has CIDEr, so it is written out here: CIDEr-D (Vedantam et
al. 2015, section 5 and appendix), with the constants of the COCO caption evaluation.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .scores import Scores, mean

_MAX_N = 4
_SIGMA = 6.0
_SCALE = 10.0
# The tokens that the COCO evaluation drops.
_PUNCTUATION = re.compile(r"""''|'(?!\w)|``|`|-LRB-|-RRB-|-LCB-|-RCB-|[.?!,:;"()\[\]{}]|--+|\.\.\.""")
Grams = Counter[tuple[str, ...]]


def caption_words(text: str) -> list[str]:
    """Lower-case words without punctuation, nearly as the Penn Treebank tokeniser of the COCO evaluation has them."""
    return _PUNCTUATION.sub(" ", text.lower().replace("\n", " ")).split()


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, about 0 to 10; document frequencies are those of the references given.

    Args:
        captions: one text per item.
        references: texts of people per item.
    """
    grams_of_references = [[_grams(text) for text in texts] for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for item in grams_of_references:
        frequency.update({gram for grams in item for gram in grams})
    log_items = math.log(max(len(references), 1))

    def vector(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_MAX_N)]
        for gram, count in grams.items():
            vectors[len(gram) - 1][gram] = count * (log_items - math.log(max(frequency[gram], 1)))
        return vectors

    scores = []
    for caption, item in zip(captions, grams_of_references, strict=True):
        grams = _grams(caption)
        own, own_length = vector(grams), _length(grams)
        similarities = [_similarity(own, vector(other), own_length - _length(other)) for other in item]
        scores.append(_SCALE * mean(similarities))
    return scores


def _grams(text: str) -> Grams:
    words = caption_words(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, _MAX_N + 1) for i in range(len(words) - n + 1))


def _length(grams: Grams) -> int:
    """In bigrams, as in the COCO evaluation."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(
    caption: Sequence[Mapping[tuple[str, ...], float]],
    reference: Sequence[Mapping[tuple[str, ...], float]],
    length_difference: int,
) -> float:
    """Mean over n of the clipped cosine, with a penalty for other lengths."""
    total = 0.0
    for ours, theirs in zip(caption, reference, strict=True):
        dot = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
        norms = math.sqrt(sum(w * w for w in ours.values())) * math.sqrt(sum(w * w for w in theirs.values()))
        total += dot / norms if norms else 0.0
    return total / _MAX_N * math.exp(-(length_difference**2) / (2 * _SIGMA**2))


def captioning(captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> Scores:
    """CIDEr-D in percent, as papers print it; BLEU-4 and ROUGE-L beside it.

    Args:
        captions: id -> text.
        references: id -> texts of people, for the same ids or more.
    """
    ids = list(captions)
    texts, wanted = [captions[i] for i in ids], [list(references[i]) for i in ids]
    per_item = cider(texts, wanted)
    rows = [{"question_id": i, "score": score} for i, score in zip(ids, per_item, strict=True)]
    details = {"CIDEr": 100 * mean(per_item), "BLEU-4": _bleu(texts, wanted), "ROUGE-L": _rouge(texts, wanted)}
    return Scores(details["CIDEr"], "CIDEr x 100", rows, details, {})


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from sacrebleu.metrics import BLEU

    most = max(map(len, references), default=0)
    streams = [[item[i] if i < len(item) else None for item in references] for i in range(most)]
    return BLEU(lowercase=True).corpus_score(list(texts), streams).score if texts else 0.0


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    best = [
        scorer.score_multi(list(item), text)["rougeL"].fmeasure for text, item in zip(texts, references, strict=True)
    ]
    return 100 * mean(best)
