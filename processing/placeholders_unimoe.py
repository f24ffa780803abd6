"""From one placeholder per medium to one token per feature, and from token lists to batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .media_policy_unimoe import ConversationError, PlaceholderError

Run = tuple[int, int, int]  # token id, how many of it, modality id
Sample = dict[str, list[int]]
# What fills the places of padding; input_ids take the tokenizer's padding token.
_FILLERS = {"attention_mask": 0, "mm_token_type_ids": 0, "labels": -100, "assistant_masks": 0}


def expand(
    input_ids: Sequence[int],
    answer: Sequence[bool],
    kinds: Mapping[int, str],
    waiting: Mapping[str, list[list[Run]]],
    where: str,
) -> Sample:
    """Replace every placeholder token by the runs of the next medium of its kind.

    Args:
        input_ids, answer: the text's tokens and whether an assistant wrote them.
        kinds: placeholder token id -> kind of medium.
        waiting: kind -> the runs of each medium, in order; those used are removed.

    Returns:
        `input_ids`, `mm_token_type_ids` and `assistant_masks`, equally long.

    Raises:
        PlaceholderError: more placeholders than media.
    """
    sample: Sample = {"input_ids": [], "mm_token_type_ids": [], "assistant_masks": []}
    for token, is_answer in zip(input_ids, answer, strict=True):
        kind = kinds.get(token)
        if kind is None:
            runs, is_text = [(token, 1, 0)], True
        elif waiting.get(kind):
            runs, is_text = waiting[kind].pop(0), False
        else:
            raise PlaceholderError(
                f"{where}: the text has more {kind} placeholders than media of that kind were given."
            )
        for token_id, count, modality in runs:
            sample["input_ids"] += [token_id] * count
            sample["mm_token_type_ids"] += [modality] * count
            sample["assistant_masks"] += [int(is_answer and is_text)] * count
    return sample


def check_all_used(waiting: Mapping[str, list[list[Run]]], where: str) -> None:
    """Raise PlaceholderError if media are left without a placeholder."""
    left = {kind: len(runs) for kind, runs in waiting.items() if runs}
    if left:
        raise PlaceholderError(f"{where}: media without a placeholder in the text are left over: {left}.")


def with_labels(sample: Sample, where: str, needs_answer: bool = True) -> Sample:
    """The sample with `labels` in place of `assistant_masks`: the token ids on answers, -100 elsewhere."""
    answer = sample["assistant_masks"]
    if needs_answer and not any(answer):
        raise ConversationError(
            f"{where}: no answer to learn from; it needs an assistant message and a template with {{% generation %}}."
        )
    labels = [token if learn else -100 for token, learn in zip(sample["input_ids"], answer, strict=True)]
    return {"input_ids": sample["input_ids"], "mm_token_type_ids": sample["mm_token_type_ids"], "labels": labels}


def truncate(sample: Sample, max_length: int, side: str, where: str) -> Sample:
    """At most `max_length` tokens, cut on `side`; text only.

    Raises:
        PlaceholderError: the cut would take features of a medium away.
    """
    length = len(sample["input_ids"])
    if length <= max_length:
        return sample
    kept = slice(0, max_length) if side == "right" else slice(length - max_length, length)
    if sum(map(bool, sample["mm_token_type_ids"])) != sum(map(bool, sample["mm_token_type_ids"][kept])):
        raise PlaceholderError(
            f"{where}: max_length={max_length} would cut the features of a medium ({length} tokens in all); raise "
            "max_length or give fewer or shorter media."
        )
    return {name: values[kept] for name, values in sample.items()}


def pad(
    samples: Sequence[Mapping[str, Sequence[int]]],
    padding_id: int,
    padding_side: str,
    pad_to_multiple_of: int | None,
    length: int = 0,
) -> dict[str, list[list[int]]]:
    """Rows of equal length with `attention_mask`: that of the longest sample, or `length` if that is more."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}.")
    size = max([len(sample["input_ids"]) for sample in samples] + [length])
    size += -size % (pad_to_multiple_of or 1)
    batch: dict[str, list[list[int]]] = {}
    for sample in samples:
        for name, row in {**sample, "attention_mask": [1] * len(sample["input_ids"])}.items():
            filler = [_FILLERS.get(name, padding_id)] * (size - len(row))
            batch.setdefault(name, []).append(filler + list(row) if padding_side == "left" else list(row) + filler)
    return batch


def to_tensors(batch: Mapping[str, list[list[int]]], return_tensors: str | None) -> dict[str, Any]:
    """int64 tensors ("pt"), arrays ("np") or the lists themselves (None)."""
    if return_tensors is None:
        return dict(batch)
    if return_tensors not in ("pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}.")
    if any(len({len(row) for row in rows}) > 1 for rows in batch.values()):
        raise ValueError("The samples differ in length: tensors need padding=True.")
    arrays = {name: np.array(rows, dtype=np.int64) for name, rows in batch.items()}
    return arrays if return_tensors == "np" else {name: torch.from_numpy(array) for name, array in arrays.items()}
