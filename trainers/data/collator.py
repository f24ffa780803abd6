"""Batches for training, from media files or from cached tower states, with one interface.

A batch holds what `UniMoeForCausalLM.forward` takes, padded on the left so that the answers end in the same column and
logits are needed for the last columns only (`logits_to_keep` says how many), and two entries for messages and logs:
`sample_ids` and `group`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from ..caches.encoder_cache import EncoderCache
from ..stages.mixer_stage import aux_of_samples, spread_aux, with_prompt
from ..steps.objective import IGNORED, columns_to_keep
from .conversations import MIXED, ConversationDataset, Sample, group_of, media_items
from .packing import Row, packed_tensors

States = dict[str, list[torch.Tensor]]
Augment = Callable[[Sample, States, np.random.Generator], tuple[Sample, States]]


@dataclass(frozen=True)
class RowRules:
    """What a stage says about rows; see `StageConfig`."""

    max_length: int | None = None
    cut_long_texts: bool = False
    packing: bool = False

    def applied(self, sample: Sample, row: Row) -> Row:
        """The row, cut if it may be. Raises DataError for one that is too long."""
        ids, labels = row
        if self.max_length is None or len(ids) <= self.max_length:
            return row
        too_long = f"it has {len(ids)} tokens, more than max_length = {self.max_length}"
        if has_media(sample):
            raise DataError(f"{sample['id']}: {too_long}, and a medium is never cut.")
        if not self.cut_long_texts:
            raise DataError(f"{sample['id']}: {too_long}; cut_long_texts would cut it.")
        if all(label == IGNORED for label in labels[1 : self.max_length]):
            raise DataError(f"{sample['id']}: {too_long}, and what is learned lies beyond.")
        return ids[: self.max_length], labels[: self.max_length]


class TokenRows:
    """Token ids and labels of samples; the same conversation is tokenised once."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._rows: dict[Any, Row] = {}

    def row(self, sample: Sample, audio_windows: Sequence[int] = ()) -> Row:
        """Ids and labels of one sample; `audio_windows` per audio item."""
        if "text" in sample:
            key: Any = sample["text"]
        else:
            key = (tuple(_skeleton(message) for message in sample["messages"]), tuple(audio_windows))
        if key not in self._rows:
            self._rows[key] = self._tokenise(sample, list(audio_windows))
        return self._rows[key]

    def _tokenise(self, sample: Sample, audio_windows: list[int]) -> Row:
        if "text" in sample:
            tokenizer = self.processor.tokenizer
            ids = tokenizer(sample["text"], split_special_tokens=True)["input_ids"]
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
            # Nothing stands before the first token to predict it from; with left padding it would be padding.
            return list(ids), [IGNORED, *ids[1:]]
        tokens = self.processor.tokenize_conversation(sample["messages"], audio_windows=audio_windows)
        return list(tokens["input_ids"]), list(tokens["labels"])


class RawCollator:
    """Batches whose media go through the model's towers.

    Args:
        pad_to_multiple_of: sequence lengths are rounded up to it: CPUs and compilers build their kernels per shape.
        rules: of the lengths of rows, and whether samples without media share them.

    Raises, when called:
        DataError: a sample is longer than the rules allow, or is a record that a stream found broken.
    """

    def __init__(self, processor: Any, pad_to_multiple_of: int = 8, rules: RowRules | None = None) -> None:
        self.processor = processor
        self.multiple = pad_to_multiple_of
        self.rules = rules or RowRules()
        self.tokens = TokenRows(processor)

    def fit(self, dataset: ConversationDataset) -> None:
        """Nothing to learn: lengths are known only once the media are open."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if broken := next((sample["fault"] for sample in samples if "fault" in sample), None):
            raise DataError(broken)
        conversations = [sample["messages"] for sample in samples if "messages" in sample]
        inputs = dict(self.processor.training_inputs(conversations)) if conversations else {}
        ids, labels = inputs.pop("input_ids", None), inputs.pop("labels", None)
        mask = inputs.pop("attention_mask", None)
        inputs.pop("mm_token_type_ids", None)
        rows, position = [], 0
        for sample in samples:
            if "text" in sample:
                rows.append(self.tokens.row(sample))
            else:
                kept = mask[position].bool()
                rows.append((ids[position][kept].tolist(), labels[position][kept].tolist()))
                position += 1
        batch = _batch(self.processor, samples, rows, self.multiple, rules=self.rules)
        return with_prompt(batch | spread_aux(inputs, samples))


class CachedCollator:
    """Batches whose media are tower states from a cache.

    Args:
        pad_to_multiple_of: sequence lengths are rounded up to it; once `fit` was called, a batch is as long as the
            longest sample of its group in that data set, so that a group has one shape.
        feature_noise: standard deviation of Gaussian noise, relative to that of every channel; one figure or one per
            "image", "video", "speech", "sound".
        token_dropout: probability that a position of the states becomes the mean state; likewise.
        augment: (sample, states, rng) -> (sample, states), e.g. to play a video backwards and turn its answer round;
            `states` as `EncoderCache.states` returns them.
        rules: as of `RawCollator`.

    Noise, dropout, augmentation and the choice among cached variants happen in training only, and depend on nothing
    but the seed that the sampler drew for the sample.
    """

    def __init__(
        self,
        processor: Any,
        cache: EncoderCache,
        pad_to_multiple_of: int = 8,
        feature_noise: float | Mapping[str, float] = 0.0,
        token_dropout: float | Mapping[str, float] = 0.0,
        augment: Augment | None = None,
        rules: RowRules | None = None,
    ) -> None:
        self.processor = processor
        self.cache = cache
        self.rules = rules or RowRules()
        self.multiple = pad_to_multiple_of
        self.feature_noise = feature_noise
        self.token_dropout = token_dropout
        self.augment = augment
        self.tokens = TokenRows(processor)
        self.lengths: dict[str, int] = {}

    def fit(self, dataset: ConversationDataset) -> None:
        """Tokenise the data set, and remember the longest sample of every group; unreadable ones do not count."""
        for sample in filter(self.cache.can_read, dataset.samples):
            group, length = group_of(sample), len(self._row(sample)[0])
            if self.rules.max_length is None or length <= self.rules.max_length:
                self.lengths[group] = max(self.lengths.get(group, 0), length)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        rows: list[Row] = []
        media: States = {}
        for sample in samples:
            shown, states = sample, {}
            if "text" not in sample:
                seed = sample.get("draw_seed")
                states = self.cache.states(sample, 0 if seed is None else seed % 1_000_003)
                if self.augment is not None and seed is not None:
                    shown, states = self.augment(sample, states, np.random.default_rng(seed))
            rows.append(self._row(shown))
            for name, tensors in states.items():
                media.setdefault(name, []).extend(tensors)
        length = max(self.lengths.get(group_of(sample), 0) for sample in samples)
        batch = _batch(self.processor, samples, rows, self.multiple, length, self.rules)
        seed = samples[0].get("draw_seed")
        for name, tensors in media.items():
            joined = torch.cat(tensors) if name in ("speech", "sound") else torch.stack(tensors)
            batch[f"{name}_encoder_states"] = joined if seed is None else self._disturb(name, joined, seed)
        return with_prompt(batch | aux_of_samples(self.processor, samples))

    def _row(self, sample: Sample) -> Row:
        return self.tokens.row(sample, () if "text" in sample else self.cache.audio_windows(sample))

    def _disturb(self, name: str, states: torch.Tensor, seed: int) -> torch.Tensor:
        noise, dropout = _figure(self.feature_noise, name), _figure(self.token_dropout, name)
        if not noise and not dropout:
            return states
        mean, std = self.cache.statistics(name)
        generator = torch.Generator().manual_seed(seed)
        states = states.float()
        if noise:
            states = torch.randn(states.shape, generator=generator).mul_(std * noise).add_(states)
        if dropout:
            dropped = torch.rand(states.shape[:-1], generator=generator) < dropout
            states = torch.where(dropped[..., None], mean, states)
        return states


_NO_RULES = RowRules()


def has_media(sample: Sample) -> bool:
    return next(media_items(sample), None) is not None


def _batch(
    processor: Any,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    multiple: int,
    length: int = 0,
    rules: RowRules = _NO_RULES,
) -> dict[str, Any]:
    """Left-padded int64 tensors [B, L]; L is the longest row or `length`, rounded up to the multiple."""
    rows = [rules.applied(sample, row) for sample, row in zip(samples, rows, strict=True)]
    if rules.packing and rules.max_length is not None and not any(map(has_media, samples)):
        batch = packed_tensors(rows, processor.padding_id, rules.max_length, multiple)
    else:
        named = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
        batch = processor.pad_tokens(named, "left", multiple, length=length)
    groups = list(dict.fromkeys(map(group_of, samples)))
    return {
        **batch,
        "logits_to_keep": columns_to_keep(batch["labels"]),
        "sample_ids": [sample["id"] for sample in samples],
        "group": groups[0] if len(groups) == 1 else MIXED,
    }


def _figure(setting: float | Mapping[str, float], name: str) -> float:
    return setting.get(name, 0.0) if isinstance(setting, Mapping) else setting


def _skeleton(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a message's tokens depend on: everything but its media's content."""
    content = message["content"]
    if isinstance(content, str):
        return message["role"], content
    keys = ("type", "text", "encoder", "after", "sound_track")
    return message["role"], *(tuple(item.get(key) for key in keys) for item in content)
