"""The plain English of stage 0: short statements and stories about the concepts, written by a small grammar."""

from collections.abc import Iterator

import numpy as np

from .build_sounds import SOUND_CLASSES
from .concepts import CATEGORIES, CONCEPTS, Concept, article
from .records import rng_for
from .text_questions import kind_phrase

STORIES = 1800
COUNTS = 700
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Lily", "Max")
FRIENDS = ("a friend", "a teacher", "the mother", "the father", "a child", "an old man", "a girl", "a boy")
TIMES = ("in the morning", "at noon", "in the evening", "at night", "today", "every day", "on Sunday")
DIRECTIONS = ("to the left", "to the right", "up", "down")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")

DETAIL_STATEMENTS = {
    "animal": ("{Thing} {have} {detail} legs.", "The number of legs of {thing} is {detail}."),
    "food": ("{Thing} {taste} {detail}.", "The taste of {thing} is {detail}."),
    "vehicle": ("{Thing} {have} {detail} wheels.", "The number of wheels of {thing} is {detail}."),
    "object": ("You use {thing} for {detail}.", "{Thing} {be} good for {detail}."),
    "nature": ("You see {thing} {detail}.", "{Detail} you see {thing}."),
}


def statements_about(concept: Concept) -> Iterator[str]:
    """Every fact of the table about one concept, in several wordings."""
    plural = concept.is_plural
    fill = {
        "thing": concept.phrase,
        "Thing": _capital(concept.phrase),
        "be": concept.be,
        "have": "have" if plural else "has",
        "taste": "taste" if plural else "tastes",
        "word": concept.word,
        "kind": kind_phrase(concept.category, plural),
        "colour": concept.colour,
        "size": concept.size,
        "place": concept.place,
        "Place": _capital(concept.place),
        "detail": concept.detail,
        "Detail": _capital(concept.detail),
        "deed": concept.deed,
    }
    patterns = (
        "{Thing} {be} {kind}.",
        "The kind of thing that {thing} {be}: {kind}.",
        "The colour of {thing} is {colour}.",
        "{Thing} {be} {colour}.",
        "{Thing} {be} {size}.",
        "{Thing} {be} {size} and {colour}.",
        "You find {thing} {place}.",
        "{Place} you find {thing}.",
        "{Thing} {deed}.",
        "{Thing} {be} {kind} and {deed}.",
        *DETAIL_STATEMENTS[concept.category],
    )
    for pattern in patterns:
        yield pattern.format(**fill)
    for category in CATEGORIES:
        if category != concept.category:
            yield f"{fill['Thing']} {concept.be} not {kind_phrase(category, plural)}."
    other_size = "small" if concept.size == "big" else "big"
    yield f"{fill['Thing']} {concept.be} {concept.size} and not {other_size}."


def story(rng: np.random.Generator) -> str:
    """One to three short sentences about one or two concepts."""
    concept, other = (CONCEPTS[int(index)] for index in rng.choice(len(CONCEPTS), size=2, replace=False))
    name, second = (NAMES[int(index)] for index in rng.choice(len(NAMES), size=2, replace=False))
    fill = {
        "a": concept.phrase,
        "A": _capital(concept.phrase),
        "the_a": f"the {concept.word}",
        "The_a": f"The {concept.word}",
        "word": concept.word,
        "be": concept.be,
        "kind": kind_phrase(concept.category, concept.is_plural),
        "colour": concept.colour,
        "size": concept.size,
        "place": concept.place,
        "Place": _capital(concept.place),
        "deed": concept.deed,
        "b": other.phrase,
        "the_b": f"the {other.word}",
        "other_place": other.place,
        "name": name,
        "second": second,
        "friend": _pick(rng, FRIENDS),
        "time": _pick(rng, TIMES),
        "way": _pick(rng, DIRECTIONS),
        "move": "move" if concept.is_plural else "moves",
    }
    return _pick(rng, STORY_PATTERNS).format(**fill)


STORY_PATTERNS = (
    "{name} sees {a} {time}. {The_a} {be} {colour}.",
    "{name} sees {a}. {The_a} {move} {way}.",
    "{name} and {second} go out {time}. {Place} they find {a}.",
    "{name} draws {a} and {b}. {second} likes {the_a} more.",
    "There {be} {a} in the picture. {The_a} {be} {size} and {colour}.",
    "In the picture {name} sees {a}. Next to it there is {friend}.",
    "{name} asks {second}: what is in the picture? {second} says: {a}.",
    "{name} says the word {word}. {second} hears it and thinks of {a}.",
    "The speaker talks about {a}. {name} listens {time}.",
    "In the video {a} {move} {way}. {name} looks at it.",
    "{name} has a book about {a} and a book about {b}.",
    "{name} looks for {a} {place}. Then {name} looks for {b} {other_place}.",
    "{A} {deed}. {name} tells it to {friend} {time}.",
    "{name} likes {a}. {second} likes {b}. They are friends.",
    "{friend} shows {a} to {name}. {name} knows that it {be} {kind}.",
    "{time} {name} dreams of {a}. {The_a} {deed}.",
)


def sound_sentences() -> Iterator[str]:
    """Sentences about the sounds, so that their labels are known words."""
    for sound_class in SOUND_CLASSES:
        label = sound_class.label
        noun = f"{article(label)} {label}"
        yield f"This is the sound of {noun}."
        yield f"You can hear {noun}."
        yield f"The sound is {noun}."
        for name in NAMES[:6]:
            yield f"{name} hears the sound of {noun}."


def counting_sentence(rng: np.random.Generator) -> str:
    """A sentence that compares, lists or counts."""
    first, second, third = (CONCEPTS[int(index)] for index in rng.choice(len(CONCEPTS), size=3, replace=False))
    if rng.random() < 0.5:
        return f"{_capital(first.phrase)}, {second.phrase} and {third.phrase}."
    name, number = _pick(rng, NAMES), _pick(rng, NUMBERS)
    return f"{name} counts to {number} and points to {first.phrase} and {second.phrase}."


def all_sentences() -> list[str]:
    """Every stage-0 text, without repetitions, in a fixed order."""
    texts = [text for concept in CONCEPTS for text in statements_about(concept)]
    texts += sound_sentences()
    texts += [_capital(story(rng_for("story", str(number)))) for number in range(STORIES)]
    texts += [counting_sentence(rng_for("counting", str(number))) for number in range(COUNTS)]
    return list(dict.fromkeys(texts))


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
