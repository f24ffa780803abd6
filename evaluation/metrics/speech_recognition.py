"""Word and character error rates, with jiwer."""

import re
from collections.abc import Mapping
from typing import Any

from .scores import Scores

_NOT_WORDS = re.compile(r"[^\w\s']")


def plain_speech(text: str) -> str:
    """Lower case without punctuation, apostrophes apart."""
    return " ".join(_NOT_WORDS.sub(" ", text.lower()).split())


def error_rates(transcripts: Mapping[Any, str], references: Mapping[Any, str]) -> Scores:
    """Word error rate in percent (lower is better) over all items; the character error rate is in `per_category`.

    Args:
        transcripts: id -> text.
        references: id -> what was said, for the same ids or more; one without words is left out.
    """
    import jiwer

    rows, words, characters = [], [0, 0], [0, 0]
    for key, text in transcripts.items():
        said, heard = plain_speech(references[key]), plain_speech(text)
        if not said:
            rows.append({"question_id": key, "score": None, "errors": 0, "length": 0})
            continue
        of_words, of_characters = jiwer.process_words(said, heard), jiwer.process_characters(said, heard)
        errors = of_words.substitutions + of_words.deletions + of_words.insertions
        length = of_words.hits + of_words.substitutions + of_words.deletions
        words = [words[0] + errors, words[1] + length]
        characters[0] += of_characters.substitutions + of_characters.deletions + of_characters.insertions
        characters[1] += of_characters.hits + of_characters.substitutions + of_characters.deletions
        rows.append({"question_id": key, "score": 100 * errors / length, "errors": errors, "length": length})
    rates = {"WER": 100 * words[0] / max(words[1], 1), "CER": 100 * characters[0] / max(characters[1], 1)}
    return Scores(rates["WER"], "percent", rows, rates)
