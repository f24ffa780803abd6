"""The text questions: what the concept table says, asked and answered in a word or a short phrase."""

from collections.abc import Iterator

from .concepts import CATEGORIES, CONCEPTS, HELDOUT_TEXT_WORDS, Concept, article
from .records import Row, make_row, rng_for

DETAIL_QUESTION = {
    "animal": "How many legs {do} {thing} have?",
    "food": "What {do} {thing} taste like?",
    "vehicle": "How many wheels {do} {thing} have?",
    "object": "What do you use {thing} for?",
    "nature": "When do you see {thing}?",
}
DEED_QUESTION = "Which {category} {deed}?"


def questions_about(concept: Concept) -> Iterator[tuple[str, str, str]]:
    """All questions about a concept: (kind, question, answer). "yes" and "no" are equally frequent."""
    fill = {"thing": concept.phrase, "be": concept.be.capitalize(), "do": concept.do}
    others = [category for category in CATEGORIES if category != concept.category]
    other = others[int(rng_for("question", concept.word).integers(len(others)))]
    yield "kind", "What kind of thing {be} {thing}?".format(**fill | {"be": concept.be}), concept.category
    yield (
        "kind",
        "Tell me the kind: animal, food, vehicle, object or nature. What {be} {thing}?".format(
            **fill | {"be": concept.be}
        ),
        concept.category,
    )
    yield "is", "{be} {thing} {kind}?".format(**fill, kind=kind_phrase(concept.category, concept.is_plural)), "yes"
    yield "is", "{be} {thing} {kind}?".format(**fill, kind=kind_phrase(other, concept.is_plural)), "no"
    yield "colour", "What colour {be} {thing}?".format(**fill | {"be": concept.be}), concept.colour
    yield "size", "{be} {thing} big or small?".format(**fill), concept.size
    yield "place", "Where do you find {thing}?".format(**fill), concept.place
    yield "detail", DETAIL_QUESTION[concept.category].format(**fill), concept.detail
    if sum(one.deed == concept.deed and one.category == concept.category for one in CONCEPTS) == 1:
        yield "deed", DEED_QUESTION.format(category=_category_noun(concept), deed=concept.deed), concept.word


def kind_phrase(category: str, plural: bool) -> str:
    """The category with its article where it takes one: "an animal", "food", "part of nature"."""
    if category == "nature":
        return "part of nature"
    if category == "food" or plural:
        return {"food": "food", "object": "objects", "animal": "animals", "vehicle": "vehicles"}[category]
    return f"{article(category)} {category}"


def _category_noun(concept: Concept) -> str:
    nouns = {"nature": "part of nature"}
    noun = nouns.get(concept.category, concept.category)
    return f"{noun}s" if concept.is_plural and noun in ("object", "animal", "vehicle") else noun


def build_text_questions() -> list[Row]:
    """The samples of the text task; all questions about `HELDOUT_TEXT_WORDS` are held out."""
    rows = []
    for concept in CONCEPTS:
        split = "heldout" if concept.word in HELDOUT_TEXT_WORDS else "train"
        for number, (kind, question, answer) in enumerate(questions_about(concept)):
            source = {"set": "unimoe", "concept": concept.word, "kind": kind}
            identity = f"text-{concept.word}-{number}"
            rows.append(make_row(identity, "text", "text", split, question, answer, source))
    return rows
