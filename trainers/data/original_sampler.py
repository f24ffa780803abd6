"""The orders in which the original Uni-MoE code draws its samples, index for index.

`ModalityBatchSampler` is what to train with: it mixes the groups in set proportions, resumes exactly and uses every
sample. These orders are for comparison with the original. All draw from torch's random numbers: seed them first, or pass
a generator.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from ...errors import DataError
from .conversations import ConversationDataset, Draw, Sample

RULES = ("length", "modality_type", "modality_type_sorted", "modality_sign")
_BITS = {"video": 4, "speech": 2, "sound": 2, "image": 1}


def original_order(
    rule: str,
    lengths: Sequence[int],
    types: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Indices of the samples in the original's order; some rules leave samples out.

    A megabatch is what one optimizer step takes: `batch_size` samples for each of `world_size` chunks.

    Args:
        rule: "length": random megabatches, longest samples first, dealt out so that all chunks get about the same
            length. "modality_type" (speech_dp): within each type by "length", cut into megabatches, the last of every
            type dropped even if it is full, megabatches shuffled. "modality_type_sorted" (8e): the same, but each type
            just sorted by length. "modality_sign" (speech, audio): two types, with media and without; their last
            megabatches come at the end, together and in order of their indices.
        lengths, types: of every sample; types as `type_of` gives them.
        world_size: devices times accumulation steps.

    Raises:
        DataError: unknown rule, or lengths and types differ in number.
    """
    if rule not in RULES or len(lengths) != len(types):
        raise DataError(f"rule is {rule!r}, one of {RULES}, with {len(lengths)} lengths and {len(types)} types.")
    size = batch_size * world_size
    kinds = [int(kind > 0) for kind in types] if rule == "modality_sign" else list(types)
    if rule == "length" or (rule == "modality_sign" and len(set(kinds)) < 2):
        return _by_length(lengths, size, world_size, generator)
    # Media first, then text, for the two types of "modality_sign"; the others from the lowest type on.
    whole: list[list[int]] = []
    rest: list[int] = []
    for kind in sorted(set(kinds), reverse=rule == "modality_sign"):
        members = [index for index, other in enumerate(kinds) if other == kind]
        own_lengths = [lengths[index] for index in members]
        if rule == "modality_type_sorted":
            order = sorted(range(len(members)), key=lambda index: own_lengths[index], reverse=True)
        else:
            order = _by_length(own_lengths, size, world_size, generator)
        megabatches = _cut([members[index] for index in order], size)
        whole += megabatches[:-1]
        rest += megabatches[-1]
    shuffled = [whole[index] for index in torch.randperm(len(whole), generator=generator).tolist()]
    if rule == "modality_sign":
        shuffled.append(sorted(rest))
    return [index for megabatch in shuffled for index in megabatch]


def type_of(sample: Sample) -> int:
    """The original's number of a sample's modalities: 4 with video, plus 2 with audio, plus 1 with images."""
    bits = {_BITS.get(name, 0) for name in sample["modality"].split("+")}  # a set: speech and sound are one bit
    return sum(bits)


def length_of(sample: Sample) -> int:
    """Words of all messages, placeholders included, which is how speech_dp measures a sample."""
    return sum(len(_written(message["content"]).split()) for message in sample["messages"])


class OriginalBatchSampler(Sampler[list[Draw]]):
    """Batches in one of the original's orders; every epoch is drawn anew.

    Args:
        dataset: conversations.
        rule, batch_size, world_size: see `original_order`.
        seed: of all epochs' orders.
    """

    drop_last = True  # read by accelerate: no batch is short

    def __init__(
        self, dataset: ConversationDataset, rule: str, batch_size: int, world_size: int = 1, seed: int = 0
    ) -> None:
        self.types = [type_of(sample) for sample in dataset.samples]
        self.lengths = [length_of(sample) for sample in dataset.samples]
        self.rule, self.batch_size, self.world_size = rule, batch_size, world_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._order()) // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self._order()
        for number, batch in enumerate(_cut(order, self.batch_size)):
            if len(batch) == self.batch_size:
                yield [Draw(index, self.seed + number * self.batch_size + place) for place, index in enumerate(batch)]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return original_order(self.rule, self.lengths, self.types, self.batch_size, self.world_size, generator)


def _by_length(
    lengths: Sequence[int], size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    ordered = [sorted(part, key=lambda index: lengths[index], reverse=True) for part in _cut(shuffled, size)]
    return [index for part in ordered for chunk in _dealt(part, lengths, world_size) for index in chunk]


def _dealt(indices: list[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Indices dealt to equally big chunks, each to the one that is shortest so far; in turn if they do not come out even."""
    if len(indices) % chunks:
        return [indices[start::chunks] for start in range(chunks)]
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    totals = [0] * chunks
    for index in indices:
        open_chunks = [chunk for chunk in range(chunks) if len(dealt[chunk]) < len(indices) // chunks]
        shortest = min(open_chunks, key=lambda chunk: totals[chunk])
        dealt[shortest].append(index)
        totals[shortest] += lengths[index]
    return dealt


def _cut(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _written(content: str | list[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in content)
