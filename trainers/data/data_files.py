"""Which files a path in a recipe stands for."""

from pathlib import Path

from ...errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")


def files_of(path: Path) -> list[Path]:
    """The data files that a path stands for; empty for a folder that `datasets` saved.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    if path.is_dir():
        if is_saved(path):
            return []
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise DataError(
                f"The folder {path} has no data in it: neither {', '.join(SUFFIXES)} files nor a saved data set."
            )
        return files
    if not path.is_file():
        raise DataError(f"The data {path} are not there: check the path.")
    if path.suffix == ".arrow":
        raise DataError(f"{path} is one file of a saved data set: give its folder.")
    return [path]


def is_saved(folder: Path) -> bool:
    """Whether `datasets` has saved a data set, or several as splits, in a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
