"""Builds the speech: every concept's word and short sentences about it, in training voices and in unseen voices."""

from collections.abc import Iterator
from pathlib import Path

from .audio_files import SPEECH_COMPRESSION, trim_silence, write_audio
from .concepts import CONCEPTS, Concept
from .records import Row, make_row, rng_for
from .voices import (
    ESPEAK_ACCENTS,
    ESPEAK_HELDOUT_VARIANTS,
    ESPEAK_TRAIN_VARIANTS,
    FLITE_HELDOUT_VOICES,
    FLITE_TRAIN_VOICES,
    NEURAL_VOICE,
    is_heldout_voice,
    start_engines,
)

WORD_QUESTION = "What word is spoken?"
SENTENCE_QUESTION = "What does the speaker talk about?"
WORD_SECONDS = 2.0
SENTENCE_SECONDS = 3.0
SENTENCE_TEMPLATES = (
    "I can see {thing}.",
    "Look at {thing}.",
    "Here {be} {thing}.",
    "We talk about {thing}.",
    "She draws {thing}.",
    "This is about {thing}.",
)
SOURCE_OF_ENGINE = {"flite": "flite", "espeak": "espeak-ng", "hibari": "hibari"}
TRAIN_ESPEAK_WORDS = 5
TRAIN_ESPEAK_SENTENCES = 3


def sentence_about(concept: Concept, template: int) -> str:
    """The spoken sentence number `template` about a concept."""
    pattern = SENTENCE_TEMPLATES[template % len(SENTENCE_TEMPLATES)]
    return pattern.format(thing=concept.phrase, be=concept.be)


def plan_speech(concept: Concept, number: int) -> Iterator[tuple[str, str, str]]:
    """All recordings of one concept: (voice, "word" or "sentence", spoken text)."""
    rng = rng_for("speech", concept.word)
    train_espeak = [f"espeak-{accent}+{variant}" for accent in ESPEAK_ACCENTS for variant in ESPEAK_TRAIN_VARIANTS]
    heldout_espeak = [f"espeak-{accent}+{variant}" for accent in ESPEAK_ACCENTS for variant in ESPEAK_HELDOUT_VARIANTS]
    chosen = [train_espeak[i] for i in rng.permutation(len(train_espeak))]
    unseen = [heldout_espeak[i] for i in rng.permutation(len(heldout_espeak))]
    recorded = [f"flite-{voice}" for voice in FLITE_TRAIN_VOICES]
    heldout = [f"flite-{voice}" for voice in FLITE_HELDOUT_VOICES]
    for voice in (*recorded, NEURAL_VOICE, *chosen[:TRAIN_ESPEAK_WORDS], *heldout, unseen[0]):
        yield voice, "word", concept.word
    sentence_voices = (
        *recorded,
        NEURAL_VOICE,
        *chosen[TRAIN_ESPEAK_WORDS : TRAIN_ESPEAK_WORDS + TRAIN_ESPEAK_SENTENCES],
        heldout[number % 2],
    )
    for offset, voice in enumerate(sentence_voices):
        yield voice, "sentence", sentence_about(concept, number + offset)


def build_speech(out: Path, files: dict[str, Path], engines: Path) -> list[Row]:
    """Speaks and writes everything; returns the samples (paths relative to `out`)."""
    speak = start_engines(files, engines)
    rows = []
    for number, concept in enumerate(CONCEPTS):
        for voice, kind, text in plan_speech(concept, number):
            name = f"{concept.word}_{voice.replace('+', '-')}" + ("_s" if kind == "sentence" else "")
            path = f"speech/{name}.ogg"
            limit = WORD_SECONDS if kind == "word" else SENTENCE_SECONDS
            write_audio(out / path, trim_silence(speak(voice, text)), limit, SPEECH_COMPRESSION)
            rows.append(
                make_row(
                    f"speech-{name}",
                    "speech",
                    "speech",
                    "heldout" if is_heldout_voice(voice) else "train",
                    WORD_QUESTION if kind == "word" else SENTENCE_QUESTION,
                    concept.word,
                    {"set": SOURCE_OF_ENGINE[voice.partition("-")[0]], "voice": voice, "text": text},
                    ("audio", path),
                )
            )
    return rows
