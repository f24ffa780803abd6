"""Where a task's official files and media are below the folder that the user names."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ...errors import DataError


class DataFolder:
    """The files of one task: in DATA/TASK, in DATA itself, or in any folder of DATA.

    Args:
        root: the folder given with --data.
        task: the task's name.
    """

    def __init__(self, root: Path, task: str) -> None:
        self.root, self.task = Path(root), task
        self._media_roots = [self.root / task / "images", self.root / task, self.root / "images", self.root]
        self._media_roots = [folder for folder in self._media_roots if folder.is_dir()]

    def find(self, names: Sequence[str]) -> Path | None:
        """The first file that is there; names may hold wildcards."""
        for name in names:
            for folder in (self.task, ".", "*"):
                found = sorted(self.root.glob(f"{folder}/{name}"))
                if found:
                    return found[0]
        return None

    def need(self, names: Sequence[str], source: str) -> Path:
        """As `find`.

        Raises:
            DataError: none is there.
        """
        found = self.find(names)
        if found is None:
            wanted = " or ".join(names)
            raise DataError(f"{self.task} needs {wanted} in {self.root / self.task} or {self.root}. {source}".strip())
        return found

    def medium(self, path: str) -> Path | None:
        """The file that an official path names, or None: at that path or its ends below the media folders.

        "/coco_images/1.jpg" is coco_images/1.jpg or 1.jpg in DATA/TASK/images, DATA/TASK, DATA/images or DATA.
        """
        parts = PurePosixPath(path.replace("\\", "/")).parts
        below = [part for part in parts if part not in ("/", ".")]
        if ".." in below or not below or "\0" in path:
            return None
        for start in range(len(below)):
            for root in self._media_roots:
                candidate = root.joinpath(*below[start:])
                if candidate.is_file():
                    return candidate
        return None
