"""Batches of one modality each, mixed in fixed proportions ("modality parallel", Uni-MoE's grouped sampling).

All batches of one optimizer step, over ranks and accumulation steps, belong to the same group, so that no rank waits
for an encoder or an expert that the others do not use.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
from torch.utils.data import Sampler

from ...errors import DataError, RecipeError
from .conversations import ConversationDataset, Draw

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
# Steps whose samples are drawn together to be sorted by length: more make steps evener, fewer more random.
_STEPS_SORTED = 16


class ModalityBatchSampler(Sampler[list[Draw]]):
    """Batches as lists of `Draw`; a pure function of its arguments and the epoch, so resuming means skipping batches.

    Args:
        groups: group name -> indices of its samples. Every group is shuffled anew each time it has been used up.
        batch_size: rows per batch; a group smaller than that repeats samples within a batch.
        num_batches: batches in all; None means about one pass over the data. Rounded up to whole optimizer steps.
        weights: share of the optimizer steps per group; None: every sample counts alike, or as `data_set_weights` say.
        seed: of the shuffling and of the draws.
        batches_per_step: batches that make one optimizer step (ranks times accumulation steps).
        samples_per_row: of groups that are packed, by name; others have one.
        origins, data_set_weights: of every index its data set, and of these the shares of the samples that are drawn
            from each. Where `weights` are given too they come first, and these divide each group's samples.
        length_of: index -> its length; then all samples of a step are about equally long.
    """

    # Read by accelerate, which hands batch i to rank i % ranks.
    drop_last = True

    def __init__(
        self,
        groups: Mapping[str, Sequence[int]],
        batch_size: int,
        num_batches: int | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        batches_per_step: int = 1,
        samples_per_row: Mapping[str, int] | None = None,
        origins: Sequence[int] | None = None,
        data_set_weights: Sequence[float] | None = None,
        length_of: Callable[[int], float] | None = None,
    ) -> None:
        empty = [name for name, indices in groups.items() if not len(indices)]
        if empty or not groups:
            raise DataError(f"The groups {empty} have no samples." if empty else "There are no groups of samples.")
        self.groups = {name: np.asarray(indices) for name, indices in groups.items()}
        self.rows = batch_size
        self.samples_per_row = dict(samples_per_row or {})
        # accelerate leaves out batches of another size than this, unless it is None.
        self.batch_size = None if samples_per_row else batch_size
        self.batches_per_step = batches_per_step
        self.length_of = length_of
        self.seed = seed
        self.epoch = 0
        self._parts = _parts_of_data_sets(self.groups, origins, data_set_weights)
        sizes = {name: sum(parts.values()) for name, parts in self._parts.items()} or {
            name: float(len(v)) for name, v in groups.items()
        }
        raw = {n: size / self._samples_per_row(n) for n, size in sizes.items()} if weights is None else dict(weights)
        self.shares = as_shares(raw)
        if num_batches is None:
            rows = sum(len(self.groups[name]) // self._samples_per_row(name) for name in self.shares)
            num_batches = rows // batch_size
        self.num_steps = max(1, -(-num_batches // batches_per_step))
        self._origins = None if origins is None else np.asarray(origins)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle differently in every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.batches_per_step

    def __iter__(self) -> Iterator[list[Draw]]:
        streams = {name: self._stream(number, name) for number, name in enumerate(self.shares)}
        most = max((self._samples_per_row(name) for name in self.shares), default=1)
        position = self.epoch * len(self) * self.rows * most
        for name in self.schedule():
            for _ in range(self.batches_per_step):
                batch = []
                for _ in range(self._samples_per_batch(name)):
                    batch.append(Draw(next(streams[name]), mix(self.seed, position)))
                    position += 1
                yield batch

    def schedule(self) -> Iterator[str]:
        """The group of every optimizer step: always the one that is furthest behind its share."""
        return islice(in_shares(self.shares), self.num_steps)

    def probes(self) -> Iterator[tuple[float, list[Draw]]]:
        """For measuring speed: of every group its share of the steps and a batch."""
        for name, share in self.shares.items():
            indices = self.groups[name].tolist()
            yield share, [Draw(indices[i % len(indices)], seed=i) for i in range(self._samples_per_batch(name))]

    def _samples_per_row(self, name: str) -> int:
        return self.samples_per_row.get(name, 1)

    def _samples_per_batch(self, name: str) -> int:
        return self.rows * self._samples_per_row(name)

    def _stream(self, number: int, name: str) -> Iterator[int]:
        shuffle = np.random.default_rng((self.seed, self.epoch, number))
        if not self._parts:
            stream = _passes(self.groups[name], shuffle)
        else:
            own = self._origins[self.groups[name]]
            shuffles = dict(zip(self._parts[name], shuffle.spawn(len(self._parts[name])), strict=True))
            streams = {o: _passes(self.groups[name][own == o], shuffles[o]) for o in self._parts[name]}
            stream = (next(streams[origin]) for origin in in_shares(as_shares(self._parts[name])))
        if self.length_of is None:
            return stream
        per_batch = self._samples_per_batch(name)
        return by_length(stream, self.length_of, per_batch, self.batches_per_step, shuffle)


def as_shares(weights: Mapping[Key, float]) -> dict[Key, float]:
    """Weights above 0, scaled to a sum of 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def in_shares(shares: Mapping[Key, float]) -> Iterator[Key]:
    """Keys without end, always the one that is furthest behind its share of what came so far; the shares sum to 1."""
    credit = dict.fromkeys(shares, 0.0)
    while True:
        for name, share in shares.items():
            credit[name] += share
        chosen = max(credit, key=lambda name: credit[name])
        credit[chosen] -= 1.0
        yield chosen


def by_length(
    stream: Iterator[Item],
    length_of: Callable[[Item], float],
    per_batch: int,
    batches: int,
    shuffle: np.random.Generator,
    steps: int = _STEPS_SORTED,
) -> Iterator[Item]:
    """The items of an endless stream, `steps` steps' worth at a time, in another order: every `batches` * `per_batch` of them are about equally long.

    Within such a step each batch holds its like, too; steps and the batches of a step are in random order.
    """
    per_step = per_batch * batches
    while True:
        drawn = list(islice(stream, per_step * steps))
        drawn.sort(key=length_of)
        for step in shuffle.permutation(steps):
            for batch in shuffle.permutation(batches):
                start = step * per_step + batch * per_batch
                yield from drawn[start : start + per_batch]


def _passes(indices: np.ndarray, shuffle: np.random.Generator) -> Iterator[int]:
    while True:
        yield from shuffle.permutation(indices).tolist()


def _parts_of_data_sets(
    groups: Mapping[str, np.ndarray], origins: Sequence[int] | None, weights: Sequence[float] | None
) -> dict[str, dict[int, float]]:
    """Group -> data set -> share of all samples that are drawn; empty without weights.

    A data set's samples are drawn alike, whichever groups they belong to.
    """
    if origins is None or weights is None:
        return {}
    own = {name: np.bincount(np.asarray(origins)[indices], minlength=len(weights)) for name, indices in groups.items()}
    sizes = np.sum(list(own.values()), axis=0)
    used = sum(weight for weight, size in zip(weights, sizes, strict=True) if size)
    return {
        name: {
            number: weights[number] / used * float(count) / float(sizes[number])
            for number, count in enumerate(counts.tolist())
            if count
        }
        for name, counts in own.items()
    }


def group_weights(dataset: ConversationDataset, modality_weights: Mapping[str, float]) -> dict[str, float] | None:
    """Weights per group from weights per group, task or modality.

    The most specific name counts; what a name weighs is split by sample counts among the groups that it stands for.

    Raises:
        RecipeError: a name that the data lack, a group without weight, or no weight above 0.
    """
    if not modality_weights:
        return None
    groups = dataset.groups
    names = {group: dataset.names_of(group) for group in groups}
    chosen = {group: next((n for n in names[group] if n in modality_weights), None) for group in groups}
    known = {name for several in names.values() for name in several}
    unknown = sorted(set(modality_weights) - known)
    missing = sorted(group for group, name in chosen.items() if name is None)
    if unknown or missing:
        raise RecipeError(
            f"modality_weights names {unknown} that the data lack and leaves out {missing}: give every modality or "
            f"task of the data a weight (0 leaves it out). The data have {sorted(known)}."
        )
    sizes: dict[str, int] = {}
    for group, name in chosen.items():
        sizes[name] = sizes.get(name, 0) + len(groups[group])
    weights = {group: modality_weights[name] * len(groups[group]) / sizes[name] for group, name in chosen.items()}
    if sum(weights.values()) <= 0:
        raise RecipeError(f"modality_weights is {dict(modality_weights)}; at least one weight must be above 0.")
    return weights


def mix(seed: int, position: int) -> int:
    """A 63-bit seed that differs in every bit between neighbouring positions (splitmix64)."""
    value = (seed * 0x9E3779B97F4A7C15 + position + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) >> 1
