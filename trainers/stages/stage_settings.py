"""What a stage was started with, on disk, so that it goes on only with the same settings and the same data."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from ...errors import CheckpointError, RecipeError
from ..data.conversations import MEDIA_KINDS, ConversationDataset, Sample, media_value, paths_of
from ..data.data_sets import TrainingData
from ..data.data_sources import Source
from ..parallel.ranks import of_first, only_first
from ..recipe.recipe import StageConfig
from ..saving.checkpoints import write_durably

SETTINGS_FILE = "settings.json"
# Settings that change nothing about what a stage computes.
_FREE_SETTINGS = ("stage.save_every", "stage.keep_checkpoints", "stage.log_every", "stage.data")
_SAMPLES = "samples"


def require_same_settings(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Refuse to go on from results of other settings.

    Raises:
        RecipeError: the stage in the folder was started with others.
        CheckpointError: its settings cannot be read.
    """
    then = _read(folder)
    if not then:
        return
    then.pop(_SAMPLES, None)  # of the data, see `require_same_data`
    # A field that came with a later release had its default.
    then["stage"] = json.loads(json.dumps(asdict(StageConfig(name)))) | then["stage"]
    now = json.loads(json.dumps(settings))
    for setting, old, new in _differences(then, now):
        if setting not in _FREE_SETTINGS:
            raise RecipeError(
                f"The stage {name!r} in {folder} was started with {setting} = {old!r}, the recipe now says "
                f"{new!r}: delete that folder to run it again, or choose another out."
            )


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a stage that is started or goes on; what is known of its data stays."""
    known = _read(folder).get(_SAMPLES)
    _write(folder, settings if known is None else {**settings, _SAMPLES: known})


def require_same_data(folder: Path, name: str, dataset: TrainingData) -> None:
    """Refuse to go on with other data than a stage was started with, and note them where they are not known yet.

    Every batch follows from seed and step, so with other data a resumed run would be no run that anybody asked for.

    Raises:
        RecipeError: the data are others. They may have been moved, the order of their samples may not have changed.
        CheckpointError: the settings of the stage cannot be read.
    """
    settings = of_first(_read(folder))  # the others may read only after it has written
    then, now = settings.get(_SAMPLES), identity_of(dataset)
    if then is None:
        _write(folder, {**settings, _SAMPLES: now})
    elif then != now:
        raise RecipeError(
            f"The stage {name!r} in {folder} was started with other data: {_shown(then)}; now {_shown(now)}. Give it the "
            "same data, wherever they lie; or delete that folder to run it again, or choose another out."
        )


def identity_of(dataset: TrainingData) -> list[dict[str, Any]]:
    """What tells data apart wherever they lie, one mapping per data set.

    Of data in memory the number of samples and a digest of what they say; of streams, which are not read for it, the
    names and sizes of their files, or what is asked of the Hub.
    """
    if isinstance(dataset, ConversationDataset):
        return [_of_samples(dataset.samples)]
    return [
        _of_stream(member) if isinstance(member, Source) else _of_samples(member.samples) for member in dataset.members
    ]


def _of_samples(samples: list[Sample]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample in samples:
        text = json.dumps(_content(sample), default=_kind_of)
        digest.update(text.encode() + b"\n")
    return {"count": len(samples), "sha256": digest.hexdigest()[:32]}


def _content(sample: Sample) -> list[Any]:
    """Modality, task and texts; of media the names. Not the id, which may be made of the place in a file."""
    spoken: list[Any] = [sample["modality"], sample["task"], sample.get("text")]
    for message in sample.get("messages", ()):
        content = message["content"]
        items = content if isinstance(content, str) else [_item(item) for item in content]
        spoken.append([message["role"], items])
    return spoken


def _item(item: dict[str, Any]) -> list[Any]:
    if item["type"] not in MEDIA_KINDS:
        return [item["type"], item.get("text")]
    return [item["type"], *(PurePath(path).name for path in paths_of(media_value(item)))]


def _kind_of(value: Any) -> str:
    return type(value).__name__


def _of_stream(source: Source) -> dict[str, Any]:
    entry = source.entry
    if entry.hub is not None:
        return {"hub": entry.hub, "subset": entry.subset, "split": entry.split, "revision": entry.revision}
    files = [part for part in source.parts if isinstance(part, Path)]
    if not files and entry.path is not None:  # saved by `datasets`
        files = sorted(Path(entry.path).rglob("*.arrow"))
    if files:
        return {"files": [[file.name, file.stat().st_size] for file in files]}
    return {"rows": source.count}


def _shown(identity: Any) -> str:
    return json.dumps(identity, ensure_ascii=False)


def _read(folder: Path) -> dict[str, Any]:
    """The settings in a stage's folder; empty if there are none yet."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        fits = isinstance(settings["stage"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, str(error)) from error
    if not fits:
        raise _damaged(file, "'stage' is no mapping")
    return settings


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged ({why}), so nobody knows what the stage was started with: delete {file.parent} to run it "
        "again, or choose another out."
    )


def _write(folder: Path, settings: dict[str, Any]) -> None:
    only_first(lambda: write_durably(folder / SETTINGS_FILE, json.dumps(settings, indent=1)))


def _differences(then: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*now, *(key for key in then if key not in now)]
        prefix = f"{name}." if name else ""
        return [d for key in keys for d in _differences(then.get(key), now.get(key), f"{prefix}{key}")]
    return [] if then == now else [(name, then, now)]
