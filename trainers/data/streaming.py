"""Data that are read while training: several data sets in set shares, in an order that depends on seeds only.

A stream keeps no state of its own. A resumed run reads the records of its first steps again, without opening their media,
and goes on where it was; so what it draws is the same to the bit, whatever was changed about workers or saving.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from ...errors import DataError, MissingPackageError
from .conversations import ConversationDataset, Sample, group_of, read_samples
from .data_sources import Source
from .original_data import OriginalRules, VoiceAs

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class StreamDraw:
    """A sample as the sampler of streams gives it out, and the seed of whatever is random about this use of it."""

    sample: Sample
    seed: int


class StreamedConversations(Dataset):
    """Data sets of which one at least is read while training; see `ConversationDataset` for what a sample holds.

    An epoch of a data set is one pass over it, in a new random order: of a data set in memory over all its samples, of a
    stream through its buffer. One that is exhausted begins its next pass; the shares of the others do not change.

    Args:
        members: streams, and data sets in memory.
        weights: share of the samples that are drawn from each.
        names: modalities, tasks or groups whose samples are used; empty means all.
    """

    def __init__(
        self, members: Sequence[Source | ConversationDataset], weights: Sequence[float], names: Sequence[str] = ()
    ) -> None:
        self.members, self.weights, self.names = list(members), list(weights), tuple(names)
        self.left_out = [
            pair for member in members if isinstance(member, ConversationDataset) for pair in member.left_out
        ]

    def __getitem__(self, draw: StreamDraw) -> Sample:
        return {**draw.sample, "draw_seed": draw.seed}

    def select(self, names: Sequence[str]) -> "StreamedConversations":
        """Only the samples whose modality, task or group is among the names; all of them when no name is given."""
        return StreamedConversations(self.members, self.weights, names) if names else self

    def passes(self, number: int, seed: int) -> Iterator[Sample]:
        """The chosen samples of one member, pass after pass without end.

        A record of a stream that is broken is {"id", "fault": why}.

        Raises:
            DataError: a whole pass had none of the chosen samples.
        """
        member = self.members[number]
        epoch = 0
        while True:
            shuffle = np.random.default_rng((seed, number, epoch))
            found = False
            for sample in _one_pass(member, shuffle):
                if "fault" not in sample:
                    if not self._chosen(sample):
                        continue
                    found = True
                yield sample
            if not found:
                raise DataError(
                    f"{self._name_of(number)} has no sample{self._of_names()}: leave it out of this stage's data."
                )
            epoch += 1

    def head(self, count: int) -> Iterator[Sample]:
        """The first chosen samples of every member that can be read, up to `count` of each."""
        for number, member in enumerate(self.members):
            left = count
            whole = member.samples if isinstance(member, ConversationDataset) else member.samples(tolerant=True)
            for sample in whole:
                if left and "fault" not in sample and self._chosen(sample):
                    left -= 1
                    yield sample
                if not left:
                    break
            if left == count:
                raise DataError(
                    f"{self._name_of(number)} has no sample{self._of_names()}: leave it out of this stage's data."
                )

    def _chosen(self, sample: Sample) -> bool:
        return not self.names or bool({sample["modality"], sample["task"], group_of(sample)} & set(self.names))

    def _name_of(self, number: int) -> str:
        member = self.members[number]
        return member.name if isinstance(member, Source) else f"The data set {number} of the recipe's data"

    def _of_names(self) -> str:
        return f" of {', '.join(self.names)}" if self.names else " that can be read"


def _one_pass(member: Source | ConversationDataset, shuffle: np.random.Generator) -> Iterator[Sample]:
    if isinstance(member, Source):
        return member.samples(shuffle, tolerant=True)
    samples = member.samples
    return (samples[index] for index in shuffle.permutation(len(samples)))


def stream_conversations(
    files: Iterable[str | Path],
    media_root: str | Path | None = None,
    original_rules: OriginalRules | None = None,
    voice_as: VoiceAs = "speech",
) -> "datasets.IterableDataset":
    """Data files as a `datasets.IterableDataset`, which reads them while it is iterated; several files are its shards.

    Args:
        files: in the authors' form or in ours (see `data`), recognised by what they hold.
        media_root: see `MediaPaths`.
        original_rules: of files in the authors' form, see `original_data`.
        voice_as: see `ConversationDataset`.

    For random access take `ConversationDataset`: messages whose content is text beside others with media do not fit into
    the columns of a `datasets.Dataset`.

    Returns:
        Samples as of `ConversationDataset`; all have `source` and `remarks`, empty where there are none.

    Raises:
        DataError: while iterating, at the first record that cannot be used.
        MissingPackageError: `datasets` is missing.
    """
    try:
        import datasets
    except ImportError:
        raise MissingPackageError("Streaming data files needs datasets: pip install 'unimoe[data]'.") from None
    names = [str(file) for file in files]
    root = None if media_root is None else str(media_root)
    settings = {"files": names, "media_root": root, "original_rules": original_rules, "voice_as": voice_as}
    return datasets.IterableDataset.from_generator(_stream, gen_kwargs=settings)


def _stream(
    files: list[str], media_root: str | None, original_rules: OriginalRules | None, voice_as: VoiceAs
) -> Iterator[Sample]:
    for file in files:
        for sample in read_samples(Path(file), media_root, original_rules, voice_as):
            # Every sample has the same columns, as tables need them.
            yield {"source": {}, "remarks": [], **sample}
