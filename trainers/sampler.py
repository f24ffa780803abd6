"""Batches of one modality each, mixed in fixed proportions ("modality parallel", Uni-MoE's grouped sampling).

All batches of one optimizer step, over ranks and accumulation steps, belong to the same group, so that no rank waits
for an encoder or an expert that the others do not use.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..errors import DataError, RecipeError
from .data import ConversationDataset, Draw


class ModalityBatchSampler(Sampler[list[Draw]]):
    """Batches as lists of `Draw`; a pure function of its arguments and the epoch, so resuming means skipping batches.

    Args:
        groups: group name -> indices of its samples. Every group is shuffled anew each time it has been used up.
        batch_size: samples per batch; a group smaller than that repeats samples within a batch.
        num_batches: batches in all; None means about one pass over the data. Rounded up to whole optimizer steps.
        weights: share of the optimizer steps per group; by number of samples when None.
        seed: of the shuffling and of the draws.
        batches_per_step: batches that make one optimizer step (ranks times accumulation steps).
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
    ) -> None:
        empty = [name for name, indices in groups.items() if not len(indices)]
        if empty or not groups:
            raise DataError(f"The groups {empty} have no samples." if empty else "There are no groups of samples.")
        self.groups = {name: np.asarray(indices) for name, indices in groups.items()}
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.epoch = 0
        raw = {name: float(len(v)) for name, v in groups.items()} if weights is None else dict(weights)
        total = sum(raw.values())
        self.shares = {name: weight / total for name, weight in raw.items() if weight > 0}
        if num_batches is None:
            num_batches = sum(len(self.groups[name]) for name in self.shares) // batch_size
        self.num_steps = max(1, -(-num_batches // batches_per_step))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle differently in every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.batches_per_step

    def __iter__(self) -> Iterator[list[Draw]]:
        streams = {name: self._stream(number, name) for number, name in enumerate(self.shares)}
        position = self.epoch * len(self) * self.batch_size
        for name in self.schedule():
            for _ in range(self.batches_per_step):
                batch = []
                for _ in range(self.batch_size):
                    batch.append(Draw(next(streams[name]), _mix(self.seed, position)))
                    position += 1
                yield batch

    def schedule(self) -> Iterator[str]:
        """The group of every optimizer step: always the one that is furthest behind its share."""
        credit = dict.fromkeys(self.shares, 0.0)
        for _ in range(self.num_steps):
            for name, share in self.shares.items():
                credit[name] += share
            chosen = max(credit, key=lambda name: credit[name])
            credit[chosen] -= 1.0
            yield chosen

    def _stream(self, number: int, name: str) -> Iterator[int]:
        shuffle = np.random.default_rng((self.seed, self.epoch, number))
        while True:
            yield from shuffle.permutation(self.groups[name]).tolist()


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


def _mix(seed: int, position: int) -> int:
    """A 63-bit seed that differs in every bit between neighbouring positions (splitmix64)."""
    value = (seed * 0x9E3779B97F4A7C15 + position + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) >> 1
