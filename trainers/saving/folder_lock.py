"""One writer per folder: a lock that dies with the process that holds it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import logging

from ...errors import CheckpointError
from .checkpoints import told

logger = logging.get_logger(__name__)

LOCK_FILE = ".lock"

_held: set[int] = set()


def _let_go_in_child() -> None:
    """Workers of data loaders are forks; one that outlives a killed trainer for a moment must not keep its folder."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def exclusive(folder: Path, waits: bool = False) -> Iterator[None]:
    """Hold a folder, which is made if need be, against a second process that writes there too.

    Args:
        waits: until somebody else who holds it lets go, or dies, instead of refusing.

    Raises:
        CheckpointError: somebody else holds it, or nothing can be written there.
    """
    with told(f"{LOCK_FILE} could not be written", folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.add(descriptor)
    owner = os.getpid()
    try:
        _lock(descriptor, folder, waits)
        yield
    finally:
        if os.getpid() == owner:
            _held.discard(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, folder: Path, waits: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no lock rather than no training
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        named = f" ({holder})" if holder else ""
        if not waits:
            raise CheckpointError(
                f"Another process{named} is training in {folder}: wait for it or choose another out."
            ) from error
        logger.warning(f"Waiting for another process{named}, which writes into {folder}.")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
