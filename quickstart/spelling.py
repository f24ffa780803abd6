"""A lesson in spelling: a quickstart's model says its corpus's words, and must learn to repeat any that it is told.

Words are told in the prompt, as text and without pictures. Half of them are to be trained on later, half are made up of
pieces of words, so that repeating is learned rather than a list.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..processing.perception.verbalize import TEXTS
from ..processing.processing_unimoe import UniMoeProcessor
from ..trainers.curriculum import run_curriculum
from ..trainers.data.conversations import ConversationDataset, Sample
from ..trainers.recipe.recipe import Recipe, StageConfig
from .sign_data import QUESTION

STEPS = 250
_FORMS = (TEXTS + "{}. " + QUESTION, "The sign says {}. " + QUESTION)
_PIECE = re.compile("[a-z]{1,4}")
_MOST_PIECES = 4
_SAMPLES = 12_000


def teach_spelling(
    start: Path,
    processor: UniMoeProcessor,
    words: Sequence[str],
    never: Collection[str],
    out: Path,
    precision: str,
    steps: int = STEPS,
) -> Path:
    """The folder of the model, from disk if it was taught before; arguments as of `spelling_samples`."""
    stage = StageConfig(
        name="spelling",
        train=["embeddings", "attention", "ffn", "norms"],
        steps=steps,
        batch_size=48,
        learning_rate=2e-3,
        warmup_steps=min(20, steps),
        min_learning_rate_ratio=0.05,
        weight_decay=0.01,
        adam_betas=[0.9, 0.98],
        save_every=100,
    )
    recipe = Recipe(model=str(start), data=["signs"], out=str(out), stages=[stage], precision=precision)  # type: ignore[arg-type]
    dataset = ConversationDataset.from_samples(spelling_samples(processor.tokenizer, words, never))
    [report] = run_curriculum(recipe, processor=processor, dataset=dataset, progress_bar=False)
    return Path(str(report.model))


def spelling_samples(
    tokenizer: Any, words: Sequence[str], never: Collection[str], count: int | None = None
) -> list[Sample]:
    """Texts that tell a word and ask for it.

    Args:
        words: half of the samples are about these.
        never: words that must not occur.
    """
    rng = np.random.default_rng(0)
    pieces = sorted(token for token in tokenizer.get_vocab() if _PIECE.fullmatch(token))
    samples: list[Sample] = []
    while len(samples) < (count or _SAMPLES):
        made_up = "".join(rng.choice(pieces, int(rng.integers(1, _MOST_PIECES + 1))))
        word = str(rng.choice(words)) if rng.random() < 0.5 else made_up
        if word not in never:
            samples.append(_sample(len(samples), word, _FORMS[int(rng.integers(len(_FORMS)))]))
    return samples


def _sample(number: int, word: str, form: str) -> Sample:
    asked = [{"type": "text", "text": form.format(word)}]
    return {
        "id": f"spelling-{number:05d}",
        "modality": "text",
        "task": "text",
        "split": "train",
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": word}]},
        ],
    }
