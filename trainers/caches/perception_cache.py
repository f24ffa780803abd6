"""What vision models saw in images, on disk by the images' content, so that training and evaluation need no vision model.

A cache is a folder with one sub-folder per perceiver (models and settings): `perceiver.json` says what it was, and
`seen-*.jsonl` hold results. A file of results is written once, whole or not at all, and never changed; its first line
lists the images and the lengths of the lines that follow, in bytes.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers.utils import logging

from ...errors import DataError
from ...processing.media_policy_unimoe import DEFAULT_POLICY, MediaPolicy
from ...processing.media_unimoe import open_media
from ...processing.perception.auxiliary import with_aux
from ...processing.perception.results import Perception
from ...processing.perception.verbalize import DEFAULT, Verbalization, verbalize
from ..data.conversations import Sample, media_items, media_value
from ..saving.checkpoints import write_durably

logger = logging.get_logger(__name__)

IDENTITY_FILE = "perceiver.json"
_FILES = "seen-*.jsonl"
# Results that a kill may lose.
RESULTS_PER_FILE = 64


class PerceptionCache:
    """Results of one perceiver, by image.

    Args:
        folder: the cache.
        perceiver: name of the sub-folder, as `Perceiver.digest` gives it; may be None where there is only one.
        policy: which images may be opened; relative paths start from its `media_root`.

    Raises:
        DataError: there is no such sub-folder, several and none is named, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path, perceiver: str | None = None, policy: MediaPolicy = DEFAULT_POLICY) -> None:
        self.folder = perceiver_folder(Path(folder), perceiver)
        self.policy = policy
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._digests: dict[str, str] = {}
        self._pending: dict[str, Perception] = {}
        for file in sorted(self.folder.glob(_FILES)):
            self._places |= _index(file)

    @classmethod
    def create(
        cls, folder: str | Path, identity: dict[str, Any], perceiver: str, policy: MediaPolicy = DEFAULT_POLICY
    ) -> "PerceptionCache":
        """The cache of a perceiver, made if it is not there."""
        own = Path(folder) / perceiver
        own.mkdir(parents=True, exist_ok=True)
        if not (own / IDENTITY_FILE).is_file():
            write_durably(own / IDENTITY_FILE, json.dumps(identity, indent=1, ensure_ascii=False))
        return cls(folder, perceiver, policy)

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    def __contains__(self, digest: str) -> bool:
        return digest in self._places or digest in self._pending

    @property
    def identity(self) -> dict[str, Any]:
        """What perceived: models and settings. Raises DataError if the file that says so is damaged."""
        file = self.folder / IDENTITY_FILE
        try:
            identity = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged_identity(file, str(error)) from error
        if not isinstance(identity, dict):
            raise _damaged_identity(file, "no mapping")
        return identity

    def digest(self, image: Any) -> str:
        """The name of an image given as path, bytes, PIL image or array; of files, by their bytes.

        Raises:
            MediaError: it cannot be opened, or may not be.
        """
        if not isinstance(image, str):
            return image_digest(image, self.policy)
        if image not in self._digests:
            self._digests[image] = image_digest(image, self.policy)
        return self._digests[image]

    def add(self, digest: str, seen: Perception) -> None:
        """Keep a result; it is on disk after `flush`, which comes by itself every `RESULTS_PER_FILE` results."""
        self._pending[digest] = seen
        if len(self._pending) >= RESULTS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        if not self._pending:
            return
        lines = [json.dumps(seen.to_json(), ensure_ascii=False) for seen in self._pending.values()]
        index = {"images": list(self._pending), "bytes": [len(line.encode()) for line in lines]}
        # Two processes may write side by side; the number of results so far keeps the names in order.
        file = self.folder / f"seen-{len(self._places):08d}-{secrets.token_hex(4)}.jsonl"
        write_durably(file, "\n".join([json.dumps(index), *lines, ""]))
        self._places |= _index(file)
        self._pending = {}

    def perception(self, image: Any) -> Perception:
        """What was seen in an image.

        Raises:
            DataError: it was not perceived.
            MediaError: it cannot be opened.
        """
        digest = self.digest(image)
        if digest in self._pending:
            return self._pending[digest]
        if digest not in self._places:
            shown = image if isinstance(image, str) else type(image).__name__
            raise DataError(
                f"The image {shown!r} is not in {self.folder}: add it with `unimoe perceive DATA --out {self.folder.parent}`, "
                "with the same options as before."
            )
        file, start, length = self._places[digest]
        with file.open("rb") as stream:
            stream.seek(start)
            line = stream.read(length)
        try:
            return Perception.from_json(json.loads(line), f"{file.name} of {self.folder}")
        except ValueError as error:
            raise DataError(f"{file} is damaged ({error}): remove it, and perceive its images again.") from error

    def of_sample(self, sample: Sample) -> list[Perception]:
        """What was seen in the images of a sample, in their order. Raises as `perception` does."""
        return [self.perception(media_value(item)) for item in media_items(sample) if item["type"] == "image"]

    def texts_of(self, sample: Sample, rules: Verbalization = DEFAULT) -> list[str]:
        """The text of each image of a sample, in their order. Raises as `perception` does."""
        return [verbalize(seen, rules) for seen in self.of_sample(sample)]

    def with_aux(self, sample: Sample, rules: Verbalization = DEFAULT, with_map: bool = True) -> Sample:
        """The sample with "aux" on its image items, as a processor takes it. Raises as `perception` does."""
        if "messages" not in sample:
            return sample
        return {**sample, "messages": with_aux(sample["messages"], self.perception, rules, with_map)}


def image_digest(image: Any, policy: MediaPolicy = DEFAULT_POLICY) -> str:
    """32 hexadecimal digits of an image's bytes, or of its pixels where it is no file."""
    if isinstance(image, Image | np.ndarray | torch.Tensor):
        array = np.asarray(image)
        return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:32]
    with open_media(image, "image", policy, image if isinstance(image, str) else "") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]  # type: ignore[arg-type]


def images_of(samples: Iterable[Sample]) -> list[Any]:
    """The different images of samples, in order of their first use; paths once each."""
    found: dict[Any, Any] = {}
    for sample in samples:
        for item in media_items(sample):
            if item["type"] == "image":
                value = media_value(item)
                found.setdefault(value if isinstance(value, str) else id(value), value)
    return list(found.values())


def perceiver_folder(folder: Path, perceiver: str | None = None) -> Path:
    """The sub-folder of a cache with one perceiver's results; arguments and errors as of `PerceptionCache`."""
    known = sorted(path.parent.name for path in folder.glob(f"*/{IDENTITY_FILE}"))
    if perceiver is None and len(known) == 1:
        return folder / known[0]
    if perceiver in known:
        return folder / str(perceiver)
    what = f"no results of {perceiver}" if perceiver is not None else f"results of {len(known)} perceivers"
    raise DataError(
        f"{folder} has {what}; it knows {', '.join(known) or 'none'}. Name one of them, or fill the cache with "
        f"`unimoe perceive DATA --out {folder}`."
    )


def _damaged_identity(file: Path, why: str) -> DataError:
    return DataError(
        f"{file} is damaged ({why}): remove this one file and run `unimoe perceive DATA --out {file.parent.parent}` with the "
        "same options as before, which writes it anew and keeps the results."
    )


def _index(file: Path) -> dict[str, tuple[Path, int, int]]:
    """Where the results of a file are: image -> (file, first byte, length)."""
    try:
        with file.open("rb") as stream:
            first = stream.readline()
        index = json.loads(first)
        start, places = len(first), {}
        for digest, length in zip(index["images"], index["bytes"], strict=True):
            places[str(digest)] = (file, start, int(length))
            start += int(length) + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}): remove it, and perceive its images again.") from error
    if start != file.stat().st_size:
        raise DataError(f"{file} has {file.stat().st_size} bytes instead of {start}: remove it, and perceive again.")
    return places
