"""The metrics as modules of the package `evaluate`, loaded from this folder: the Hub is not asked.

Example:
    >>> from unimoe.evaluation.modules import load_module
    >>> load_module("anls").compute(predictions=["12 $"], references=[["12 $", "12"]])
    {'anls': 1.0}
"""

from pathlib import Path
from typing import Any

from ...errors import DataError, MissingPackageError


def module_names() -> list[str]:
    """What `load_module` takes."""
    return sorted(file.parent.name for file in Path(__file__).parent.glob("*/*.py"))


def load_module(name: str) -> Any:
    """The `evaluate.Metric` of this name; `evaluate.load(folder)` with the folder beside this file does the same.

    Raises:
        DataError: there is no such module.
        MissingPackageError: `evaluate` is not installed.
    """
    if name not in module_names():
        raise DataError(f"There is no metric module {name!r}; there are {', '.join(module_names())}.")
    try:
        import evaluate
    except ImportError as error:
        raise MissingPackageError("Metric modules need the package evaluate: pip install 'unimoe[eval]'.") from error
    return evaluate.load(str(Path(__file__).parent / name))
