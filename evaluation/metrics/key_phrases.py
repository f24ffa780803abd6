"""What MMMU and CMMMU take for the answer in a free text: the tails behind words such as "therefore", and numbers."""

import re
from collections.abc import Sequence

_LONE_MARKS = {":", ",", ".", "!", "?", ";", "'"}


def answer_tails(parts: Sequence[str], indicators: Sequence[str]) -> list[str]:
    """Of each part the shortest tail after the last occurrence of an indicator; parts without one give nothing.

    "=" counts as an indicator in the last part only. As in the originals an empty tail does not stop a later, longer
    one from taking its place.
    """
    tails = []
    for number, part in enumerate(parts):
        words = [*indicators, "="] if number == len(parts) - 1 else indicators
        shortest = ""
        for word in words:
            if word in part:
                tail = part.rpartition(word)[2].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _LONE_MARKS:
            tails.append(shortest)
    return tails


def numbers_in(text: str, comma: str, ends_at_word: bool) -> list[str]:
    """Numbers in a text: with thousands separators, then in scientific notation, then plain ones, signs included.

    Args:
        comma: the thousands separator.
        ends_at_word: whether a number must end where a word ends, as MMMU asks for.
    """
    edge = r"\b" if ends_at_word else ""
    behind = rf"(?![{comma}\d])" if ends_at_word else rf"(?!{comma}\d)"
    exponent = r"[eE][+-]?\d+"
    patterns = (
        rf"-?{edge}\d{{1,3}}(?:{comma}\d{{3}})+{edge}",
        rf"-?\d+(?:\.\d+)?{exponent}",
        rf"-?(?:\d+\.\d+|\.\d+|\d+{edge})(?!{exponent}){behind}",
    )
    return [number for pattern in patterns for number in re.findall(pattern, text)]


def as_number(text: str) -> float | None:
    """The number rounded to two decimals if the text is one once commas are gone."""
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return None


def any_candidate_fits(candidates: Sequence[str | float], answers: Sequence[str | float]) -> bool:
    """Whether a text among the candidates contains an answer, or a number equals one."""
    for candidate in candidates:
        if not isinstance(candidate, str):
            if candidate in answers:
                return True
        elif any(isinstance(answer, str) and answer in candidate for answer in answers):
            return True
    return False
