"""Questions about media that are described in words, for stage 0.

A language model that has read "[picture: a cat] What is in the picture?" answers before any encoder is connected;
connectors then only have to put a real picture in the place of the description.
"""

from collections.abc import Iterator

from . import build_images, build_sounds, build_speech, build_videos
from .concepts import CONCEPTS
from .records import rng_for

SPOKEN_FORMS = 2
MOVING_FORMS = 3


def described_questions() -> Iterator[tuple[str, str, str]]:
    """All of them: (task, user's text, answer)."""
    yield from _pictures()
    yield from _speech()
    yield from _sounds()
    yield from _videos()


def _pictures() -> Iterator[tuple[str, str, str]]:
    colours = sorted({concept.colour for concept in CONCEPTS})
    for concept in CONCEPTS:
        rng = rng_for("described-picture", concept.word)
        background, other = (colours[int(index)] for index in rng.choice(len(colours), size=2, replace=False))
        for description in (
            f"[picture: {concept.phrase}]",
            f"[picture: {concept.word}]",
            f"[picture of {concept.phrase} on a {background} background]",
            f"[picture: {concept.size} {other} {concept.word}]",
        ):
            yield "image", f"{description} {build_images.QUESTION}", concept.word


def _speech() -> Iterator[tuple[str, str, str]]:
    for number, concept in enumerate(CONCEPTS):
        for description in (f"[speech: {concept.word}]", f"[voice says: {concept.word}]"):
            yield "speech", f"{description} {build_speech.WORD_QUESTION}", concept.word
        for offset in range(SPOKEN_FORMS):
            sentence = build_speech.sentence_about(concept, number + offset)
            yield "speech", f"[speech: {sentence}] {build_speech.SENTENCE_QUESTION}", concept.word


def _sounds() -> Iterator[tuple[str, str, str]]:
    for sound_class in build_sounds.SOUND_CLASSES:
        label = sound_class.label
        for description in (
            f"[sound: {label}]",
            f"[sound of {label}]",
            f"[short sound: {label}]",
            f"[recording: {label}]",
            f"[loud sound: {label}]",
            f"[soft sound: {label}]",
        ):
            yield "sound", f"{description} {build_sounds.QUESTION}", label


def _videos() -> Iterator[tuple[str, str, str]]:
    directions = tuple(build_videos.DIRECTIONS)
    for number, concept in enumerate(CONCEPTS):
        for form in range(MOVING_FORMS):
            direction = directions[(number + form) % len(directions)]
            move = "move" if concept.is_plural else "moves"
            description = (
                f"[video: {concept.phrase} {move} {direction}]",
                f"[video: {concept.word}, {direction}]",
                f"[video of {concept.phrase} that {move} {direction}]",
            )[form % 3]
            yield "video_direction", f"{description} {build_videos.DIRECTION_QUESTION}", direction
            yield "video_object", f"{description} {build_videos.OBJECT_QUESTION}", concept.word
