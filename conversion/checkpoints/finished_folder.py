"""Folders that are there when they are complete: written under a hidden name beside it, and renamed at the end."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ...errors import ConversionError

try:
    import fcntl
except ImportError:  # Windows: what killed processes leave there stays until somebody removes it
    fcntl = None  # type: ignore[assignment]

# Held by the process that writes; the operating system lets go when it dies.
_LOCK = ".unimoe-work"
_NEW, _OLD = "new", "old"


@contextmanager
def finished_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder that becomes `target` if the block ends well, and vanishes if it does not.

    What processes that were killed left beside `target` is removed first.

    Args:
        replace: take the place of an existing folder; otherwise one that is not empty is refused.

    Raises:
        ConversionError: `target` is a file, or not empty (also if it was empty at first), or cannot be written.
    """
    target = target.resolve()  # of a link: beside the folder that it leads to
    _remove_abandoned(target)
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file; name a folder.")
    if not replace and target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{target} is not empty: name a new folder, or remove it first.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work, _held(Path(work)):
            folder = Path(work) / _NEW
            folder.mkdir()
            yield folder
            if target.is_dir() and replace:
                os.replace(target, Path(work) / _OLD)
            elif target.exists():
                _remove_empty(target)
            os.replace(folder, target)
    except OSError as error:
        raise ConversionError(f"{target} cannot be written ({error}). Nothing of it is left there.") from error


def _remove_empty(target: Path) -> None:
    try:
        target.rmdir()
    except OSError as error:
        raise ConversionError(f"{target} was empty at the start and is not any more: name another folder.") from error


@contextmanager
def _held(work: Path) -> Iterator[None]:
    """Mark a folder as one in which this process works."""
    if fcntl is None:
        yield
        return
    # Locked before it gets its name: nobody ever finds it without the lock while we live.
    with (work / f"{_LOCK}-new").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, work / _LOCK)
        yield


def _remove_abandoned(target: Path) -> None:
    """Remove work folders whose process has died; if it died while it replaced `target`, the old one comes back."""
    named = re.compile(re.escape(f".{target.name}-") + r"[a-z0-9_]{8}")
    for work in sorted(target.parent.glob(".*")) if target.parent.is_dir() else ():
        if not named.fullmatch(work.name) or not (work / _LOCK).is_file():
            continue
        with (work / _LOCK).open("r+") as lock:
            if not _is_free(lock):
                continue
            if (work / _OLD).is_dir() and not target.exists():
                os.replace(work / _OLD, target)
            shutil.rmtree(work, ignore_errors=True)


def _is_free(lock: IO[str]) -> bool:
    """Takes the lock if nobody holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
