"""The answer normaliser of the VQA evaluation servers: TextVQA, A-OKVQA, OK-VQA, VQAv2, VizWiz, ST-VQA.

Its oddities are part of the scores: only the first 32 periods go (a flag stands where a count belongs), and a comma
between digits never counts because commas are gone by then.
"""

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_MAX_PERIODS = int(re.UNICODE)
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# The words whose apostrophes the evaluation restores. Texts are lower case by then, so words with "I" are not needed.
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Of these the table has the spellings that lack exactly one apostrophe.
_MORE_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, character in enumerate(word) if character == "'"]


_CONTRACTIONS = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
_CONTRACTIONS |= {key: word for word in _MORE_APOSTROPHES.split() for key in _without_one_apostrophe(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the published table has this pair the wrong way round


def normalise_answer(text: str) -> str:
    """An answer as the evaluation servers compare it.

    Example:
        >>> normalise_answer("The two dogs, I dont know.")
        "2 dogs i don't know"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _without_marks(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_marks(text: str) -> str:
    has_comma_between_digits = _DIGITS_WITH_COMMA.search(text) is not None
    result = text
    for mark in _MARKS:
        is_beside_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_beside_blank or has_comma_between_digits else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)
