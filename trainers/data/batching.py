"""How the samples of a stage become batches: which sampler, and how many texts share a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from ...errors import ConversationError, DataError
from ..recipe.recipe import StageConfig
from .collator import RowRules, TokenRows, has_media
from .conversations import MIXED, ConversationDataset, Sample
from .data_sets import TrainingData
from .lengths import length_estimate
from .sampler import ModalityBatchSampler, group_weights
from .stream_sampler import StreamBatchSampler
from .streaming import StreamedConversations

BatchSampler: TypeAlias = ModalityBatchSampler | StreamBatchSampler
_TEXTS_MEASURED = 256


@dataclass(frozen=True)
class Batching:
    """What a sampler needs to know of a stage.

    Args:
        mixed, by_length: `batches: mixed` and `group_by_length` of `StageConfig`.
        texts_per_row: samples without media that share a row; 1 without packing.
        processor: knows how long media are.
    """

    mixed: bool = False
    by_length: bool = False
    texts_per_row: int = 1
    processor: Any = None


def batching_of(stage: StageConfig, dataset: TrainingData, processor: Any) -> Batching:
    """The batching of a stage; with packing some texts are tokenised, to see how many of them fill a row."""
    rules = row_rules(stage)
    texts_per_row = texts_that_fill_a_row(dataset, processor, rules) if rules.packing else 1
    return Batching(stage.batches == MIXED, stage.group_by_length, texts_per_row, processor)


def row_rules(stage: StageConfig) -> RowRules:
    return RowRules(stage.max_length, stage.cut_long_texts, stage.packing)


def texts_that_fill_a_row(dataset: TrainingData, processor: Any, rules: RowRules) -> int:
    """How many samples without media have `max_length` tokens together, by the mean of some that are spread evenly."""
    tokens = TokenRows(processor)
    lengths = []
    for sample in _some_texts(dataset):
        try:
            lengths.append(len(rules.applied(sample, tokens.row(sample))[0]))
        except (ConversationError, DataError):
            continue  # it will be left out of training, too
    if not lengths or rules.max_length is None:
        return 1
    return max(1, int(rules.max_length * len(lengths) / sum(lengths)))


def make_sampler(
    dataset: TrainingData,
    batching: Batching,
    batch_size: int,
    num_steps: int | None,
    batches_per_step: int,
    seed: int,
    modality_weights: Mapping[str, float] | None = None,
) -> BatchSampler:
    """The batches of a run, over all ranks.

    Args:
        num_steps: optimizer steps; None means about one pass over the data, which streams cannot have.
        batches_per_step: ranks times accumulation steps.
    """
    estimate = length_estimate(batching.processor) if batching.by_length else None
    if isinstance(dataset, StreamedConversations):
        if num_steps is None:
            raise DataError("Streamed data have no end: set max_steps.")
        return StreamBatchSampler(
            dataset,
            batch_size,
            num_steps,
            seed=seed,
            batches_per_step=batches_per_step,
            mixed=batching.mixed,
            samples_per_row=None if batching.texts_per_row == 1 else lambda s: _per_row(s, batching.texts_per_row),
            length_of=estimate,
        )
    groups = {MIXED: list(range(len(dataset)))} if batching.mixed else dataset.groups
    per_row = {
        name: batching.texts_per_row
        for name in groups
        if batching.texts_per_row > 1 and _is_text(dataset, groups[name])
    }
    return ModalityBatchSampler(
        groups,
        batch_size,
        num_batches=None if num_steps is None else num_steps * batches_per_step,
        weights=group_weights(dataset, modality_weights or {}),
        seed=seed,
        batches_per_step=batches_per_step,
        samples_per_row=per_row,
        origins=dataset.origins,
        data_set_weights=dataset.weights,
        length_of=None if estimate is None else lambda index: estimate(dataset.samples[index]),
    )


def _some_texts(dataset: TrainingData) -> list[Sample]:
    if isinstance(dataset, StreamedConversations):
        return [sample for sample in dataset.head(_TEXTS_MEASURED) if not has_media(sample)]
    texts = [sample for sample in dataset.samples if not has_media(sample)]
    return list(islice(texts, 0, None, max(1, len(texts) // _TEXTS_MEASURED)))


def _per_row(sample: Sample, texts_per_row: int) -> int:
    return 1 if has_media(sample) else texts_per_row


def _is_text(dataset: ConversationDataset, indices: list[int]) -> bool:
    return not any(has_media(dataset.samples[index]) for index in indices)
