"""Several short texts in one row, none of which sees another.

A packed batch tells transformers so in its own way: the positions of every text start at 0, which "eager" and "sdpa" make
a block-diagonal mask of, and `cu_seq_lens_q` and its siblings say where texts begin, which flash attention reads. With
them the model takes `attention_mask` for what is padding only. Padding is a text of its own that nothing learns from.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..steps.objective import IGNORED

Row = tuple[list[int], list[int]]


def fill_rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Which texts share a row of at most `max_length` tokens: the longest first, each where it fits first.

    Returns:
        Numbers of texts per row, in order; a text of more than max_length tokens has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((row for row, left in enumerate(room) if left >= lengths[number]), None)
        if place is None:
            rows.append([number])
            room.append(max_length - lengths[number])
        else:
            rows[place].append(number)
            room[place] -= lengths[number]
    return [sorted(row) for row in rows]


def packed_tensors(rows: Sequence[Row], padding_id: int, max_length: int, multiple: int = 1) -> dict[str, Any]:
    """A packed batch of texts' ids and labels.

    Returns:
        input_ids, attention_mask (0 at padding, which stands on the left), labels and position_ids, int64 [B, S] with S
        the longest row rounded up to the multiple; cu_seq_lens_q and cu_seq_lens_k, int32, the borders of texts and
        padding in the batch laid end to end; max_length_q and max_length_k, the longest of these.
    """
    lengths = [len(ids) for ids, _ in rows]
    filled = fill_rows(lengths, max_length)
    width = max(sum(lengths[number] for number in row) for row in filled)
    width += -width % multiple
    ids, labels, mask, positions, pieces = [], [], [], [], []
    for row in filled:
        padding = width - sum(lengths[number] for number in row)
        ids.append([padding_id] * padding)
        labels.append([IGNORED] * padding)
        mask.append([0] * padding + [1] * (width - padding))
        positions.append(list(range(padding)))
        pieces += [padding] if padding else []
        for number in row:
            own_ids, own_labels = rows[number]
            ids[-1] += own_ids
            # The last token of the text before must not learn to say the first one of this.
            labels[-1] += [IGNORED, *own_labels[1:]]
            positions[-1] += range(len(own_ids))
            pieces.append(len(own_ids))
    borders = torch.tensor([0, *pieces]).cumsum(0).to(torch.int32)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}
    return {
        **{name: torch.tensor(values) for name, values in tensors.items()},
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(pieces),
        "max_length_k": max(pieces),
    }
