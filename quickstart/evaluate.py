"""Held-out questions, answered freely as text; an answer counts when it is exactly right."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling_unimoe.auxiliary_unimoe import AUX_INPUTS
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.processing_unimoe import UniMoeProcessor
from ..trainers.caches.encoder_cache import EncoderCache
from ..trainers.data.collator import CachedCollator
from ..trainers.steps.objective import IGNORED
from ..trainers.telemetry.routing_figures import ExpertLoad
from ..trainers.telemetry.routing_statistics import RoutingRecorder

TASKS = ("image", "speech", "sound", "video_direction", "video_object", "text")
MAX_ANSWER_TOKENS = 12
BATCH_SIZE = 64


@dataclass(frozen=True)
class Answer:
    """One held-out item and what the model said."""

    sample: dict[str, Any]
    text: str
    truth: str

    @property
    def is_right(self) -> bool:
        return self.text.strip() == self.truth


def truth_of(sample: dict[str, Any]) -> str:
    return "".join(item["text"] for item in sample["messages"][-1]["content"]).strip()


@torch.no_grad()
def answer_samples(
    model: UniMoeForCausalLM, processor: UniMoeProcessor, cache: EncoderCache, samples: list[dict[str, Any]]
) -> list[Answer]:
    """Greedy answers of the model to samples whose tower states are in the cache, in the given order."""
    model.eval()
    collator = CachedCollator(processor, cache)
    by_task = defaultdict(list)
    for index, sample in enumerate(samples):
        by_task[sample["task"]].append(index)
    answers: dict[int, Answer] = {}
    for indices in by_task.values():
        for start in range(0, len(indices), BATCH_SIZE):
            chunk = indices[start : start + BATCH_SIZE]
            texts = _generate(model, processor, collator, [samples[i] for i in chunk])
            for index, text in zip(chunk, texts, strict=True):
                answers[index] = Answer(samples[index], text, truth_of(samples[index]))
    return [answers[index] for index in range(len(samples))]


def accuracy_by_task(answers: list[Answer]) -> dict[str, float]:
    """Share of exactly right answers of each task that occurs."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for answer in answers:
        right[answer.sample["task"]] += answer.is_right
        total[answer.sample["task"]] += 1
    return {task: right[task] / total[task] for task in TASKS if total[task]}


@torch.no_grad()
def answer_loss(
    model: UniMoeForCausalLM, processor: UniMoeProcessor, cache: EncoderCache, samples: list[dict[str, Any]]
) -> float:
    """Cross entropy per token of the right answers: its mean over tasks."""
    model.eval()
    collator = CachedCollator(processor, cache)
    losses: dict[str, list[float]] = defaultdict(list)
    for task in dict.fromkeys(sample["task"] for sample in samples):
        of_task = [sample for sample in samples if sample["task"] == task]
        for start in range(0, len(of_task), BATCH_SIZE):
            batch = collator(of_task[start : start + BATCH_SIZE])
            labels = batch["labels"]
            inputs = {name: value for name, value in _model_inputs(batch).items() if name != "logits_to_keep"}
            logits = model(**inputs).logits[:, :-1].float()
            learned = labels[:, 1:] != IGNORED
            losses[task] += torch.nn.functional.cross_entropy(
                logits[learned], labels[:, 1:][learned], reduction="none"
            ).tolist()
    return sum(sum(values) / len(values) for values in losses.values()) / len(losses)


def spread(samples: list[dict[str, Any]], per_task: int) -> list[dict[str, Any]]:
    """At most `per_task` samples of each task, evenly spread over the list."""
    chosen = []
    for task in TASKS:
        of_task = [sample for sample in samples if sample["task"] == task]
        step = max(1, len(of_task) / per_task)
        chosen += [of_task[int(i * step)] for i in range(min(per_task, len(of_task)))]
    return chosen


@torch.no_grad()
def load_by_modality(
    model: UniMoeForCausalLM, processor: UniMoeProcessor, cache: EncoderCache, samples: list[dict[str, Any]]
) -> dict[str, list[list[float]]]:
    """Expert load per sparse layer, [layers][experts], of the samples of each modality (all their tokens)."""
    model.eval()
    collator = CachedCollator(processor, cache)
    by_modality = defaultdict(list)
    for sample in samples:
        by_modality[sample["modality"]].append(sample)
    with RoutingRecorder(model, list(by_modality)) as recorder:
        for recorder.task, members in enumerate(by_modality.values()):
            model(**_model_inputs(collator(members[:BATCH_SIZE])))
    counts = recorder.counts.read()
    config = model.config.text_config
    loads = [ExpertLoad.of(config, *both) for both in zip(counts.tokens_NM, counts.chosen_NLMX, strict=True)]
    return {modality: load.layer_shares.tolist() for modality, load in zip(by_modality, loads, strict=True)}


def _model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("sample_ids", "group", "labels")}


def _generate(
    model: UniMoeForCausalLM,
    processor: UniMoeProcessor,
    collator: CachedCollator,
    samples: list[dict[str, Any]],
) -> list[str]:
    batch = collator(samples)
    prompts = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        answer_start = int((labels != IGNORED).nonzero()[0])
        prompts.append({"input_ids": ids[:answer_start][mask[:answer_start].bool()].tolist()})
    inputs = processor.pad_tokens(prompts, "left")
    seen = {name: value for name, value in batch.items() if name.endswith("_encoder_states") or name in AUX_INPUTS}
    seen.pop("prompt_mask", None)  # all that is given here is prompt
    output = model.generate(**inputs, **seen, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
