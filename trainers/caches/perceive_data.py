"""Fills a cache with what a perceiver sees in the images of data files; goes on where it was stopped."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import MediaError
from ...processing.media_policy_unimoe import DEFAULT_POLICY, MediaPolicy
from ...processing.media_unimoe import load_image
from ...processing.perception.perceiver import Perceiver
from ..data.conversations import Sample, read_samples
from .perception_cache import PerceptionCache, images_of


@dataclass
class PerceptionPlan:
    """What is to be done.

    Fields: `samples` of the data; different `images` among them, of which `known` are in the cache already; `missing`, the
    rest, by digest; `unreadable` ones with the reasons.
    """

    samples: int
    images: int
    known: int
    missing: dict[str, Any] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def open_cache(folder: str | Path, perceiver: Perceiver, policy: MediaPolicy = DEFAULT_POLICY) -> PerceptionCache:
    """The cache of a perceiver, made if it is not there."""
    return PerceptionCache.create(folder, perceiver.identity(), perceiver.digest(), policy)


def data_samples(files: Sequence[str | Path], media_root: str | Path | None = None) -> list[Sample]:
    """The samples of data files, their media unopened. Raises DataError for what cannot be read."""
    return [sample for file in files for sample in read_samples(Path(file), media_root)]


def plan_perception(samples: Sequence[Sample], cache: PerceptionCache) -> PerceptionPlan:
    """Read every image's bytes, and see which are new to the cache."""
    images = images_of(samples)
    plan = PerceptionPlan(len(samples), len(images), 0)
    for image in images:
        try:
            digest = cache.digest(image)
        except MediaError as error:
            plan.unreadable.append((_shown(image), error.reason))
            continue
        if digest in cache:
            plan.known += 1
        else:
            plan.missing.setdefault(digest, image)
    return plan


def carry_out(
    plan: PerceptionPlan, perceiver: Perceiver, cache: PerceptionCache, batch_size: int = 8, progress: bool = True
) -> int:
    """Perceive what is missing; an interruption keeps what was done. Returns the number of new results.

    Images that cannot be decoded are added to `plan.unreadable`.
    """
    items, done = list(plan.missing.items()), 0
    with tqdm(total=len(items), desc="Perceiving", unit="image", disable=not progress or not items) as bar:
        try:
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                opened = {
                    digest: image for digest, value in batch if (image := _opened(value, cache, plan)) is not None
                }
                for digest, seen in zip(opened, perceiver.perceive(list(opened.values())), strict=True):
                    cache.add(digest, seen)
                done += len(opened)
                bar.update(len(batch))
        finally:
            cache.flush()
    return done


def _opened(value: Any, cache: PerceptionCache, plan: PerceptionPlan) -> Any:
    try:
        return load_image(value, cache.policy, _shown(value))
    except MediaError as error:
        plan.unreadable.append((_shown(value), error.reason))
        return None


def _shown(image: Any) -> str:
    return image if isinstance(image, str) else type(image).__name__
