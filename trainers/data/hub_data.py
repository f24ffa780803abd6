"""Data sets of the Hub, which is asked for those that a recipe names and for nothing else."""

from typing import Any

from ...errors import DataError, MissingPackageError
from ...hub_access import why_silent
from ..recipe.recipe_data import DataEntry


def load_from_hub(entry: DataEntry) -> Any:
    """The data set of an entry with `hub`: a `datasets.Dataset`, or with `streaming` a `datasets.IterableDataset`.

    With HF_HUB_OFFLINE only what is in the local cache is used. Code of data sets is never run.

    Raises:
        DataError: the Hub is silent or is not to be asked and the data are not in its cache, or it has no such data set,
            configuration or split.
        MissingPackageError: `datasets` is missing.
    """
    try:
        import datasets
    except ImportError:
        raise MissingPackageError("Data sets of the Hub need datasets: pip install 'unimoe[data]'.") from None
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if not constants.HF_HUB_OFFLINE and (silence := why_silent(constants.ENDPOINT, f"datasets/{entry.hub}")):
        raise DataError(
            f"The data set {entry.hub} cannot be had from the Hub ({constants.ENDPOINT}: {silence}). Check the network, or "
            "set HF_HUB_OFFLINE=1 to use what is in the local cache."
        )
    try:
        return datasets.load_dataset(
            entry.hub,
            entry.subset,
            split=entry.split or "train",
            revision=entry.revision,
            streaming=entry.streaming,
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0].rstrip(".")
        raise DataError(
            f"The data set {entry.hub} cannot be had from the Hub ({reason}). Check its name, subset, split and revision."
        ) from error
