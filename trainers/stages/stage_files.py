"""What a finished stage leaves: written aside, marked done with sizes and digests, looked at before it is used."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging

from ...errors import CheckpointError
from ..parallel.ranks import only_first
from ..saving.checkpoints import (
    discard,
    flush_files,
    flush_folder,
    manifest_of,
    read_manifest,
    told,
    verify_files,
    write_durably,
)
from .stage import CHECKPOINTS_FOLDER, StageReport

logger = logging.get_logger(__name__)

STAGE_FILE = "stage.json"
DONE_FILE = "DONE"
MODEL_FOLDER = "model"
START_FOLDER = "start"
# What later stages read; cards and the like may be edited.
_RESULTS = (f"{MODEL_FOLDER}/*.safetensors", f"{MODEL_FOLDER}/*.json", "*.safetensors")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, and put it in the place of another once it is whole and on the disk.

    Raises:
        CheckpointError: it could not be written.
    """
    written = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(written, ignore_errors=True)
    try:
        with told(f"{folder.name} could not be written", folder.parent):
            yield written
            flush_folder(written)
            if folder.exists():
                shutil.rmtree(folder)
            written.rename(folder)
    except CheckpointError:
        shutil.rmtree(written, ignore_errors=True)  # it may be what fills the disk
        raise


def mark_done(folder: Path) -> None:
    """Mark a stage, or an expert's run of it, as finished; its checkpoints go."""
    files = sorted(path for pattern in _RESULTS for path in folder.glob(pattern))
    flush_files(files)
    write_durably(folder / DONE_FILE, json.dumps(manifest_of(folder, files), indent=1))
    clear_work(folder)


def clear_work(done: Path) -> None:
    """Delete what a finished stage no longer needs; again, where a killed process had begun to."""
    for name in (CHECKPOINTS_FOLDER, START_FOLDER):
        try:
            discard(done / name)
        except OSError as error:
            logger.warning(f"{done / name} is no longer needed but could not be deleted: {error}")


def verify_results(folder: Path) -> None:
    """Compare what a finished stage left with what it wrote. Raises CheckpointError naming the first file that differs."""
    if (folder / DONE_FILE).is_file():
        manifest = read_manifest(folder / DONE_FILE)
        remedy = "Put it back, or delete this folder to run the stage again."
        verify_files(folder, manifest, f"the finished stage {folder}", remedy)


def saved_report(folder: Path) -> StageReport | None:
    """What a stage reported; None while it has not ended."""
    file = folder / STAGE_FILE
    return StageReport.from_dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def write_report(report: StageReport, folder: Path) -> None:
    """Keep a report; all ranks must call it."""
    text = json.dumps(asdict(report), indent=1, default=str)
    only_first(lambda: write_durably(folder / STAGE_FILE, text))
