"""Checkpoint folders that are either whole or ignored.

A checkpoint is written under a temporary name, renamed, and only then gets its `COMPLETE` file: a JSON mapping from
every file to its size and SHA-256. A folder without it is what a killed process left behind.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from ..errors import CheckpointError

logger = logging.get_logger(__name__)

COMPLETE_FILE = "COMPLETE"
SAVING_FOLDER = ".saving"
LOCK_FILE = ".lock"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def seal(written: Path, final: Path) -> None:
    """Move a finished folder to its place and mark it complete; safe against a kill at any moment."""
    files = sorted(path for path in written.rglob("*") if path.is_file())
    manifest = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            manifest[str(path.relative_to(written))] = [path.stat().st_size, _digest(path)]
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)
    _sync_folder(final.parent)
    write_durably(final / COMPLETE_FILE, json.dumps(manifest, indent=1))


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is either there as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; incomplete ones are named in a warning each."""
    if not folder.is_dir():
        return []
    found = sorted((int(m[1]), path) for path in folder.iterdir() if (m := _NAME.match(path.name)))
    complete = []
    for _, path in found:
        if (path / COMPLETE_FILE).is_file():
            complete.append(path)
        else:
            logger.warning(f"The checkpoint {path} is incomplete (its process was stopped while saving): ignored.")
    return complete


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, verified; None when there is none.

    Raises:
        CheckpointError: a file of it is missing or damaged.
    """
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        return None
    verify(checkpoints[-1])
    return checkpoints[-1]


def verify(checkpoint: Path) -> None:
    """Compare a checkpoint with its manifest. Raises CheckpointError naming the first file that differs."""
    manifest = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    for name, (size, digest) in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != size:
            problem = f"has {path.stat().st_size} bytes instead of {size}"
        elif _digest(path) != digest:
            problem = "has other content than was written"
        else:
            continue
        raise CheckpointError(
            f"{name} of the checkpoint {checkpoint} {problem}. Put it back, or delete the checkpoint's folder to go on "
            "from the one before it."
        )


def rotate(folder: Path, keep: int, spared: Path | None = None) -> None:
    """Delete all but the newest complete checkpoints, and the spared one."""
    for checkpoint in complete_checkpoints(folder)[:-keep]:
        if spared is not None and checkpoint.name == spared.name:
            continue
        # Without its mark first, so that a kill in between leaves no half of a complete checkpoint.
        (checkpoint / COMPLETE_FILE).unlink()
        shutil.rmtree(checkpoint)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder against a second process that writes there too; the operating system lets go when we die.

    Raises:
        CheckpointError: somebody else holds it.
    """
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows: no lock rather than no training
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"Another process is training in {folder}: wait for it or choose another out."
            ) from error
        yield


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
