"""Where the media that a data file names are on this machine."""

import os
from pathlib import Path, PurePath


class MediaPaths:
    """Makes absolute paths of a data file's paths; call it with one.

    Relative paths start from `media_root`, or from `folder` when that is None. An absolute path, which names a place on the
    machine where the file was written, stays as it is when `media_root` is None. Otherwise its longest end that exists
    below `media_root` is taken: /data/coco/train/1.jpg is coco/train/1.jpg there, or train/1.jpg, or 1.jpg.

    Args:
        folder: the data file's.
        media_root: the folder that holds the media, or None.
    """

    def __init__(self, folder: str | Path, media_root: str | Path | None = None) -> None:
        self.root = Path(folder if media_root is None else media_root).absolute()
        self._replaces_roots = media_root is not None
        self._parts_to_drop: dict[PurePath, int] = {}

    def __call__(self, path: str) -> str:
        named = PurePath(path)
        if not self._replaces_roots or not named.is_absolute():
            return str(self.root / named)
        named = PurePath(os.path.normpath(path))  # or .. could lead out of media_root
        below = named.parts[1:]
        # Files of one folder lie together, so what served one of them is tried first for the others.
        known = self._parts_to_drop.get(named.parent, 0)
        for drop in dict.fromkeys([known, *range(len(below))]):
            found = self.root.joinpath(*below[drop:])
            if os.path.isfile(found):
                self._parts_to_drop[named.parent] = drop
                return str(found)
        return str(self.root.joinpath(*below))
