"""Batches from streams, where nobody knows beforehand which modalities come and how many."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

from .conversations import Sample, group_of
from .sampler import as_shares, by_length, in_shares, mix
from .streaming import StreamDraw, StreamedConversations

# Fewer than in memory: what waits to be sorted comes late, that of rare groups very late.
_STEPS_SORTED = 4
_MOST_PROBES = 4


class StreamBatchSampler(Sampler[list[StreamDraw]]):
    """Batches as lists of `StreamDraw`; a pure function of its arguments and of the data.

    Samples are drawn from the data sets by their weights, and wait with others of their group until they are enough for
    an optimizer step on all ranks; then that step is theirs. So modalities come as often as the data hold them, and a rare
    one gets a step when a step's samples of it have come.

    Every rank goes through all records and opens the media of its own batches only.

    Args:
        batch_size, seed, batches_per_step: as of `ModalityBatchSampler`.
        num_steps: optimizer steps.
        mixed: all samples are one group.
        samples_per_row: sample -> how many of its like share a row, where samples are packed.
        length_of: sample -> its length; then all samples of a step are about equally long.
    """

    drop_last = True

    def __init__(
        self,
        dataset: StreamedConversations,
        batch_size: int,
        num_steps: int,
        seed: int = 0,
        batches_per_step: int = 1,
        mixed: bool = False,
        samples_per_row: Callable[[Sample], int] | None = None,
        length_of: Callable[[Sample], float] | None = None,
    ) -> None:
        self.dataset = dataset
        self.rows, self.num_steps, self.batches_per_step = batch_size, num_steps, batches_per_step
        self.batch_size = None if samples_per_row else batch_size  # accelerate leaves out batches of another size
        self.seed, self.epoch, self.mixed = seed, 0, mixed
        self._samples_per_row, self._length_of = samples_per_row, length_of

    def set_epoch(self, epoch: int) -> None:
        """Shuffle differently in every epoch of the trainer, which is a whole run."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.batches_per_step

    def __iter__(self) -> Iterator[list[StreamDraw]]:
        position = self.epoch << 48
        for step in islice(self._steps(), self.num_steps):
            size = len(step) // self.batches_per_step
            for start in range(0, len(step), size):
                batch = []
                for sample in step[start : start + size]:
                    batch.append(StreamDraw(sample, mix(self.seed, position)))
                    position += 1
                yield batch

    def probes(self) -> Iterator[tuple[float, list[StreamDraw]]]:
        """For measuring speed: a batch of each of the first steps, which stand for all."""
        steps = list(islice(self._steps(), min(_MOST_PROBES, self.num_steps)))
        for step in steps:
            batch = step[: len(step) // self.batches_per_step]
            yield 1 / len(steps), [StreamDraw(sample, seed) for seed, sample in enumerate(batch)]

    def _steps(self) -> Iterator[list[Sample]]:
        """The samples of one optimizer step after another, all of one group."""
        groups: dict[tuple[str, int], _Group] = {}
        broken: list[Sample] = []
        for sample in self._samples():
            if "fault" in sample:
                broken.append(sample)
                continue
            per_row = 1 if self._samples_per_row is None else self._samples_per_row(sample)
            key = ("" if self.mixed else group_of(sample), per_row)
            if key not in groups:
                shuffle = np.random.default_rng((self.seed, self.epoch, len(groups)))
                groups[key] = _Group(self.rows * per_row, self.batches_per_step, self._length_of, shuffle)
            # A broken record takes a place beside the next whole one, where it is counted as unreadable.
            like = {"modality": sample["modality"], "task": sample["task"]}
            for arrived in (*({**record, **like} for record in broken), sample):
                yield from groups[key].take(arrived)
            broken = []

    def _samples(self) -> Iterator[Sample]:
        members = range(len(self.dataset.members))
        seed = mix(self.seed, self.epoch)
        streams = [self.dataset.passes(number, seed) for number in members]
        shares = as_shares(dict(zip(members, self.dataset.weights, strict=True)))
        for number in in_shares(shares):
            yield next(streams[number])


class _Group:
    """Samples of one group on their way into steps."""

    def __init__(
        self,
        per_batch: int,
        batches: int,
        length_of: Callable[[Sample], float] | None,
        shuffle: np.random.Generator,
    ) -> None:
        self.per_batch, self.batches, self.length_of, self.shuffle = per_batch, batches, length_of, shuffle
        self.arrived: list[Sample] = []
        self.ready: list[list[Sample]] = []

    def take(self, sample: Sample) -> Iterator[list[Sample]]:
        """Add a sample; gives a step whenever a step's samples have come, of those that waited longest."""
        self.arrived.append(sample)
        per_step = self.per_batch * self.batches
        if len(self.arrived) % per_step:
            return
        if self.length_of is None:
            self.ready, self.arrived = [self.arrived], []
        elif len(self.arrived) == per_step * _STEPS_SORTED:
            arrived = iter(self.arrived)
            ordered = by_length(arrived, self.length_of, self.per_batch, self.batches, self.shuffle, _STEPS_SORTED)
            self.ready = [list(islice(ordered, per_step)) for _ in range(_STEPS_SORTED)]
            self.arrived = []
        if self.ready:
            yield self.ready.pop()
