"""The folder of uploads: only what lies in it is ever read or sent, and it does not grow without end."""

import os
from pathlib import Path

# What a file counts at least, so that many small ones make room too.
_LEAST_BYTES = 1 << 16


class UploadFolder:
    """A folder of its own, for the uploads of one server.

    Args:
        folder: exists, and holds nothing else.
        most_bytes: of all uploads together.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder.resolve(), most_bytes
        self._kept: frozenset[Path] = frozenset()

    def keep_what_is_there(self) -> None:
        """Files that are there now, the examples, are never removed to make room."""
        self._kept = frozenset(path for path in self.folder.rglob("*") if path.is_file())

    def holds(self, path: str) -> bool:
        """Whether a path names a file in the folder, links followed. No URL does."""
        try:
            resolved = Path(path).resolve()
            return os.path.isabs(path) and resolved.is_relative_to(self.folder) and resolved.is_file()
        except (OSError, ValueError):  # too long, or with a null character
            return False

    def make_room(self, size: int) -> None:
        """Remove the oldest uploads until `size` more bytes fit."""
        files = [(path, path.stat()) for path in self.folder.rglob("*") if path.is_file() and path not in self._kept]
        total = sum(max(stat.st_size, _LEAST_BYTES) for _, stat in files) + size
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= max(stat.st_size, _LEAST_BYTES)

    def remove_halves(self) -> None:
        """Remove what is left of broken uploads; to be called while none is on its way."""
        for path in self.folder.glob("tmp*"):
            if path.is_file() and path not in self._kept:
                path.unlink(missing_ok=True)
