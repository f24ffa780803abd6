"""The language model of a composed model, with rows for the tokens that it did not know."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.tensor_parts import PartsView
from ..dense.llama_family import HEAD
from ..dense.sources import Source
from .composed_part import ComposedPart, Made

EMBEDDING = "model.language_model.embed_tokens.weight"
# Matrix products are fast on rows in multiples of it.
_ROWS_MULTIPLE = 8
# New rows are the mean of the others plus so much of their deviation, so that no two are equal.
_NEW_ROW_NOISE = 0.01


def language_part(source: Source, rows: int, replaced: Iterable[str], seed: int) -> ComposedPart:
    """Everything of a source that no other part replaces.

    Args:
        rows: of the vocabulary, see `grown_rows`.
        replaced: beginnings of our names that other parts give.
        seed: of what is drawn for new rows.
    """
    begins = tuple(replaced)
    kept = {ours: key for ours, key in source.keys.items() if not ours.startswith(begins)}
    tensors = {}
    for ours, key in kept.items():
        shape, read = tuple(source.checkpoint.tensors[key].shape), partial(source.checkpoint.read, key)
        stored = source.checkpoint.parts[key].stored if isinstance(source.checkpoint, PartsView) else key
        tensors[ours] = Made(shape, (read,), (stored,))
        if ours in (EMBEDDING, HEAD) and rows > shape[0]:
            new = partial(_new_rows, read, rows - shape[0], seed)
            tensors[ours] = Made((rows, shape[1]), (read, new), (stored,))
    dropped = {key: "another part takes its place" for ours, key in source.keys.items() if ours not in kept}
    text = source.config.text_config
    facts = f"{text.num_hidden_layers} layers of width {text.hidden_size}, {text.vocab_size:,} words"
    return ComposedPart(
        "language model",
        source.name,
        source.folder,
        facts,
        tuple(source.checkpoint.files),
        tensors,
        {**source.dropped, **dropped},
    )


def grown_rows(text: UniMoeTextConfig, highest_id: int) -> int:
    """Rows of the embedding table when the vocabulary must reach this id."""
    if highest_id < text.vocab_size:
        return text.vocab_size
    return math.ceil((highest_id + 1) / _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def grown_config(text: UniMoeTextConfig, rows: int) -> UniMoeTextConfig:
    """A copy for so many rows. Raises ConversionError for a sparse decoder."""
    if text.sparse_layers:
        raise ConversionError(
            "The language model is sparse already. Compose the dense model first; `unimoe convert upcycle` then makes it "
            "sparse."
        )
    config = copy.deepcopy(text)
    config.vocab_size = rows
    return config


def word_scale(source: Source) -> float:
    """Root mean square of the word embeddings."""
    return float(source.checkpoint.read(source.keys[EMBEDDING]).float().square().mean().sqrt())


def _new_rows(read: Callable[[], torch.Tensor], count: int, seed: int) -> torch.Tensor:
    table = read().float()
    drawn = torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(seed))
    return table.mean(dim=0) + _NEW_ROW_NOISE * table.std(dim=0) * drawn


__all__ = ["grown_config", "grown_rows", "language_part", "word_scale"]
