"""Runs data through a model and counts what its routers do: by task, layer, modality and expert, and on which words.

Shape suffixes as in `trainers/telemetry/routing_statistics.py`: T tokens, L sparse layers, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..errors import DataError
from ..modeling_unimoe.configuration_unimoe_text import MODALITIES
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..trainers.data.bad_samples import TolerantCollator
from ..trainers.data.collator import RawCollator
from ..trainers.data.conversations import ConversationDataset, Sample, group_of
from ..trainers.telemetry.routing_figures import ExpertLoad
from ..trainers.telemetry.routing_statistics import RoutingCounts, RoutingRecorder

logger = logging.get_logger(__name__)

TEXT = MODALITIES.index("text")
_NOT_FOR_THE_MODEL = ("labels", "logits_to_keep", "sample_ids", "group", "bad_samples")


@dataclass
class Passage:
    """One sample as the model read it: pieces of text (media as their modality's name in brackets), each with its expert.

    best: layer -> the expert that weighs most in every piece.
    """

    task: str
    id: str
    pieces: list[str]
    best: dict[int, list[int]]


@dataclass
class Usage:
    """What was counted.

    Args:
        tasks: in the order of the counts.
        samples: of each task that were read.
        words: text token -> choices by its occurrences, [L, E]; and how often it came.
        skipped: (id, reason) of samples that could not be read.
    """

    tasks: list[str]
    samples: list[int]
    counts: RoutingCounts
    layers: list[int]
    words: dict[int, np.ndarray] = field(default_factory=dict)
    occurrences: dict[int, int] = field(default_factory=dict)
    passages: list[Passage] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def load(self, model_config: Any, task: int | None = None) -> ExpertLoad:
        """Of one task, or of all."""
        tokens, chosen = self.counts.tokens_NM, self.counts.chosen_NLMX
        part = slice(None) if task is None else slice(task, task + 1)
        return ExpertLoad.of(model_config, tokens[part].sum(dim=0), chosen[part].sum(dim=0))


@torch.no_grad()
def measure_usage(
    model: UniMoeForCausalLM,
    processor: Any,
    dataset: ConversationDataset,
    batch_size: int = 8,
    limit: int | None = None,
    on_samples: Callable[[int], None] | None = None,
) -> Usage:
    """Count over a data set, answers included, as a training would see it.

    Args:
        limit: at most so many samples, evenly over the tasks and evenly within each.
        on_samples: called with the number of samples of every batch.

    Raises:
        DataError: not a single sample can be read.
    """
    model.eval()
    samples = chosen_samples(dataset.samples, limit)
    tasks = list(dict.fromkeys(sample["task"] for sample in samples))
    recorder = RoutingRecorder(model, tasks, keep_last=True)
    usage = Usage(tasks, [0] * len(tasks), recorder.counts, sorted(model.config.text_config.sparse_layers))
    usage.skipped = [(str(sample["id"]), reason) for sample, reason in dataset.left_out]
    collator = TolerantCollator(RawCollator(processor))
    with recorder:
        for batch_samples in _batches(samples, batch_size):
            recorder.task = tasks.index(batch_samples[0]["task"])
            batch = collator(batch_samples)
            usage.skipped += batch.get("bad_samples", ())
            if batch["sample_ids"]:
                inputs = {k: v for k, v in batch.items() if k not in _NOT_FOR_THE_MODEL}
                inputs = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
                model(**inputs, logits_to_keep=1, use_cache=False)
                usage.samples[recorder.task] += len(batch["sample_ids"])
                _note_words(usage, model, processor, batch, recorder)
            if on_samples is not None:
                on_samples(len(batch_samples))
    if not sum(usage.samples):
        name, reason = usage.skipped[0] if usage.skipped else ("-", "there are none.")
        raise DataError(f"None of the {len(samples)} samples can be read; the first, {name}: {reason}")
    usage.counts = recorder.counts.read()
    return usage


def chosen_samples(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """All, or `limit` of them: the same number of every task where there are so many, evenly over its samples."""
    if limit is None or limit >= len(samples):
        return list(samples)
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample["task"], []).append(sample)
    chosen: list[Sample] = []
    # The smallest first: what they lack, the others may have.
    for index, members in enumerate(sorted(by_task.values(), key=len)):
        count = min(len(members), -(-(limit - len(chosen)) // (len(by_task) - index)))
        chosen += [members[i * len(members) // count] for i in range(count)]
    return chosen


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Batches of like samples of one task."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample["task"], group_of(sample)), []).append(sample)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _note_words(
    usage: Usage, model: UniMoeForCausalLM, processor: Any, batch: dict[str, Any], recorder: RoutingRecorder
) -> None:
    """Which text tokens went to which experts; and the first sample of every task, piece by piece."""
    if not recorder.last:
        return
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    modality_ids = model.model.modality_ids(ids)
    weight_LTE = torch.stack(recorder.last).cpu()
    text_T = ((modality_ids == TEXT) & mask).reshape(-1)
    unique, place = ids.reshape(-1)[text_T].unique(return_inverse=True)
    sums = torch.zeros(len(unique), weight_LTE.shape[0], weight_LTE.shape[2])
    sums.index_add_(0, place, (weight_LTE[:, text_T] > 0).float().transpose(0, 1))
    times = torch.bincount(place, minlength=len(unique))
    for token, choices, count in zip(unique.tolist(), sums.numpy().astype(np.int32), times.tolist(), strict=True):
        usage.words[token] = usage.words[token] + choices if token in usage.words else choices
        usage.occurrences[token] = usage.occurrences.get(token, 0) + count
    task = usage.tasks[recorder.task]
    if all(passage.task != task for passage in usage.passages):
        usage.passages.append(_passage(usage, processor, batch, modality_ids[0], weight_LTE[:, : ids.shape[1]], task))


def _passage(
    usage: Usage, processor: Any, batch: dict[str, Any], modality_S: torch.Tensor, weight_LSE: torch.Tensor, task: str
) -> Passage:
    """The first sample of a batch; a run of one medium's tokens is one piece."""
    pieces: list[str] = []
    runs: list[list[int]] = []
    previous = TEXT
    for position in batch["attention_mask"][0].nonzero().flatten().tolist():
        modality = int(modality_S[position])
        if modality != TEXT and modality == previous:
            runs[-1].append(position)
        else:
            token = processor.tokenizer.decode([int(batch["input_ids"][0, position])])
            pieces.append(token if modality == TEXT else MODALITIES[modality])
            runs.append([position])
        previous = modality
    pieces = [f"[{p}: {len(run)} tokens]" if len(run) > 1 else p for p, run in zip(pieces, runs, strict=True)]
    best = {
        layer: [int(weight_SE[run].sum(dim=0).argmax()) for run in runs]
        for layer, weight_SE in zip(usage.layers, weight_LSE, strict=True)
    }
    return Passage(task, str(batch["sample_ids"][0]), pieces, best)
