"""The data sets of a recipe, opened together."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from ...errors import RecipeError
from ..recipe.recipe_data import DataEntry, entries_of
from .conversations import ConversationDataset
from .data_sources import Source
from .original_data import OriginalRules, VoiceAs
from .streaming import StreamedConversations

TrainingData: TypeAlias = ConversationDataset | StreamedConversations


def open_data(
    data: Sequence[str | DataEntry | Source],
    media_root: str | Path | None = None,
    voice_as: VoiceAs = "speech",
    max_missing: float = 0.0,
    original_rules: OriginalRules | None = None,
) -> TrainingData:
    """Data sets as one: in memory, or read while training if any of them is streamed.

    Args:
        data: paths, entries, or `Source`s, which may also hold data sets in memory.
        media_root, voice_as, original_rules: for entries that set none of their own.
        max_missing: share of the samples in memory whose media may be missing; these are left out.

    Raises:
        DataError: a data set is not there, cannot be read or is empty, or too many media are missing.
    """
    sources = [
        one if isinstance(one, Source) else Source(entries_of([one])[0], media_root, voice_as, original_rules)
        for one in data
    ]
    given = [source.entry.weight for source in sources]
    weights = None if None in given else [weight for weight in given if weight is not None]
    streamed = [source.entry.streaming for source in sources]
    if not any(streamed):
        return ConversationDataset.from_data_sets([list(source.samples()) for source in sources], weights, max_missing)
    members = [
        source if flows else ConversationDataset.from_data_sets([list(source.samples())], None, max_missing)
        for source, flows in zip(sources, streamed, strict=True)
    ]
    return StreamedConversations(members, weights or [1.0] * len(members))


def in_memory(data: TrainingData, what: str) -> ConversationDataset:
    """The data, if they are in memory. Raises RecipeError if not, saying `what` needs that."""
    if isinstance(data, StreamedConversations):
        raise RecipeError(f"{what} needs all samples beforehand, but the data are streamed: leave streaming out.")
    return data
