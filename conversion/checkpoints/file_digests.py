"""SHA-256 of the files that a conversion read, for its receipt."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm


def file_digests(files: Iterable[Path], progress: bool = True) -> dict[Path, str]:
    """Digest of every file, once each, by its resolved path."""
    paths = list(dict.fromkeys(file.resolve() for file in files))
    digests = {}
    with tqdm(
        total=sum(path.stat().st_size for path in paths),
        unit="B",
        unit_scale=True,
        desc="Digests",
        disable=not progress,
    ) as bar:
        for path in paths:
            with open(path, "rb") as file:
                digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
            bar.update(path.stat().st_size)
    return digests
