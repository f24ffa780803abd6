"""Data files as streaming data sets of the `datasets` library."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingPackageError
from .data import Sample, read_samples
from .original_data import OriginalRules

if TYPE_CHECKING:
    import datasets


def stream_conversations(
    files: Iterable[str | Path], media_root: str | Path | None = None, original_rules: OriginalRules | None = None
) -> "datasets.IterableDataset":
    """Data files as a `datasets.IterableDataset`, which reads them while it is iterated; several files are its shards.

    Args:
        files: in the authors' form or in ours (see `data`), recognised by what they hold.
        media_root: see `MediaPaths`.
        original_rules: of files in the authors' form, see `original_data`.

    Returns:
        Samples as of `ConversationDataset`; all have `source` and `remarks`, empty where there are none.

    Raises:
        DataError: while iterating, at the first record that cannot be used.
        MissingPackageError: `datasets` is missing.
    """
    try:
        import datasets
    except ImportError:
        raise MissingPackageError("Streaming data files needs datasets: pip install 'unimoe[eval]'.") from None
    names = [str(file) for file in files]
    root = None if media_root is None else str(media_root)
    settings = {"files": names, "media_root": root, "original_rules": original_rules}
    return datasets.IterableDataset.from_generator(_stream, gen_kwargs=settings)


def _stream(files: list[str], media_root: str | None, original_rules: OriginalRules | None) -> Iterator[Sample]:
    for file in files:
        for sample in read_samples(Path(file), media_root, original_rules):
            # Every sample has the same columns, as tables need them.
            yield {"source": {}, "remarks": [], **sample}
