"""transformers' own progress bars, one per file that it reads or writes: off the screen where ours say more."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def transformers_bars(shown: bool) -> Iterator[None]:
    """Show or hide them inside the block; afterwards they are as before."""
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
