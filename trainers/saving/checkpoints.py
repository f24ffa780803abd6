"""Checkpoint folders that are either whole or ignored.

A checkpoint is written aside, under `SAVING_FOLDER`. Its files and folders are flushed to the disk, it is renamed to its
place, and only then gets its `COMPLETE` file: a JSON mapping from every file to its size and SHA-256. A folder without it
is what a killed process left behind.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging

from ...errors import CheckpointError

logger = logging.get_logger(__name__)

COMPLETE_FILE = "COMPLETE"
SAVING_FOLDER = ".saving"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_ANOTHER_WAY = "Put it back, or delete the checkpoint's folder to go on from the one before it."

Manifest = dict[str, list[int | str]]


def seal(written: Path, final: Path) -> None:
    """Move a finished folder to its place and mark it complete; safe against a kill at any moment."""
    manifest = manifest_of(written, _files(written))
    flush_folder(written)
    discard(final)
    written.rename(final)
    _sync_folder(final.parent)
    write_durably(final / COMPLETE_FILE, json.dumps(manifest, indent=1))


def discard(folder: Path) -> None:
    """Delete a checkpoint, or a folder of them, marks first: a kill in between leaves no half of a complete one."""
    if folder.exists():
        for mark in folder.rglob(COMPLETE_FILE):
            mark.unlink()
        shutil.rmtree(folder)


def manifest_of(folder: Path, files: Iterable[Path]) -> Manifest:
    """Size and SHA-256 of every file, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files}


def flush_files(files: Iterable[Path]) -> None:
    """Bring files to the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Bring all files below a folder, and the folders that name them, to the disk."""
    flush_files(_files(folder))
    for below in (path for path in folder.rglob("*") if path.is_dir()):
        _sync_folder(below)
    _sync_folder(folder)


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is either there as a whole or not at all. Raises CheckpointError."""
    temporary = path.with_name(f"{path.name}.new")
    with told(f"{path.name} could not be written", path.parent):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log. Raises CheckpointError."""
    with told(f"{path.name} could not be written", path.parent), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def told(problem: str, folder: Path) -> Iterator[None]:
    """Say what became of a write that failed, instead of the bare error of the system.

    Raises:
        CheckpointError: the disk is full, the folder is read-only, or the like.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{problem} in {folder}: {error}. Complete checkpoints are untouched: make room or give the right to write, and "
            "start again to go on from the newest."
        ) from error


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
    mark = checkpoint / COMPLETE_FILE
    if not mark.is_file():
        raise CheckpointError(
            f"The checkpoint {checkpoint} is incomplete: it has no file {COMPLETE_FILE}, so its process was stopped while "
            "saving, or another program wrote it. Go on from an older one, or from the beginning."
        )
    manifest = read_manifest(mark)
    verify_files(checkpoint, manifest, f"the checkpoint {checkpoint}", _ANOTHER_WAY)
    strangers = sorted(
        {path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)} - {*manifest, mark.name}
    )
    if strangers:
        raise CheckpointError(
            f"{strangers[0]} of the checkpoint {checkpoint} was not written with it. Take it away to go on from there."
        )


def verify_files(folder: Path, manifest: Manifest, what: str, remedy: str) -> None:
    """Compare files with a manifest. Raises CheckpointError naming the first that differs, of `what`, and the remedy."""
    for name, (size, digest) in manifest.items():
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != size:
            problem = f"has {path.stat().st_size} bytes instead of {size}"
        elif _digest(path) != digest:
            problem = "has other content than was written"
        else:
            continue
        raise CheckpointError(f"{name} of {what} {problem}. {remedy}")


def read_manifest(file: Path) -> Manifest:
    """The manifest in a file; an empty file holds none. Raises CheckpointError when it is damaged."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8") or "{}")
        if all(
            Path(name).name and ".." not in Path(name).parts and len(entry) == 2 for name, entry in manifest.items()
        ):
            return manifest
    except (ValueError, AttributeError, TypeError):
        pass  # not JSON, or not a mapping to pairs
    raise CheckpointError(f"{file.name} of {file.parent} is damaged: it does not list files. {_ANOTHER_WAY}")


def rotate(folder: Path, keep: int, spared: Path | None = None) -> None:
    """Delete all but the newest complete checkpoints, and the spared one."""
    for checkpoint in complete_checkpoints(folder)[:-keep]:
        if spared is None or checkpoint.name != spared.name:
            discard(checkpoint)


def _files(folder: Path) -> list[Path]:
    """Files below a folder; hidden ones, which file managers and network disks leave anywhere, do not count."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
