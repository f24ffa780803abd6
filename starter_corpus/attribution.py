"""Writes ATTRIBUTION.md and the notice of the share-alike folder from the list of sources."""

from pathlib import Path

from .sources import PROGRAM_OUTPUT, SHARE_ALIKE_FOLDER, SOURCES, Source

LICENCE_URLS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "https://opensource.org/license/mit",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
}

_HEAD = """# Where the starter corpus comes from

This file is written by the builder from `sources.py`, which also refuses any other licence. The text, the questions
and the builder are the project's own and under the licence of the repository (Apache-2.0). `source.set` in each line
of the JSON files names the row of this table that a picture, a recording or a clip comes from.

What was changed: drawings were rendered at 64 pixels, reduced to 96 colours, and moved, scaled, mirrored and put on
other backgrounds to make videos; sounds were mixed to one channel, cut, evened out in loudness, resampled to 16 kHz
and compressed.

"""

_SPEECH_NOTE = f"""
`{PROGRAM_OUTPUT}`: spoken by a program from our own words. The licence of a speech program covers the program, not what
it says; no part of flite or eSpeak NG is in this folder.
"""

_MIT_NOTICE = """
## Notice required by the MIT licence

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

It holds for: Fluent Emoji (Copyright (c) Microsoft Corporation); FluidR3 (Copyright (c) 2000-2002, 2008 Frank Wen;
Copyright (c) 2008 Toby Smithe).
"""

_SHARE_ALIKE_NOTICE = """The pictures and the file heldout.jsonl in this folder are adapted from OpenMoji
(https://openmoji.org), the open-source emoji and icon project, and are licensed under the

    Creative Commons Attribution-ShareAlike 4.0 International License (CC BY-SA 4.0)
    https://creativecommons.org/licenses/by-sa/4.0/legalcode

Attribution: "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0",
taken from the npm package {package} {version}.
Changes: each drawing was rendered at 64 pixels, turned, mirrored, scaled, recoloured slightly and placed on a
background.

Whoever shares these pictures, or pictures made of them, does so under the same licence. Nothing outside this folder
is made of them: they serve to evaluate models, not to train them.
"""


def write_attribution(out: Path) -> None:
    """Writes `ATTRIBUTION.md` and `share_alike/LICENSE` under the root of the corpus."""
    rows = "".join(_table_row(source) for source in SOURCES)
    table = "| set | package | licence | author | what was taken | where |\n|---|---|---|---|---|---|\n" + rows
    (out / "ATTRIBUTION.md").write_text(_HEAD + table + _SPEECH_NOTE + _MIT_NOTICE, encoding="utf-8")
    for source in SOURCES:
        if source.folder == SHARE_ALIKE_FOLDER:
            notice = _SHARE_ALIKE_NOTICE.format(package=source.package, version=source.version)
            (out / SHARE_ALIKE_FOLDER).mkdir(parents=True, exist_ok=True)
            (out / SHARE_ALIKE_FOLDER / "LICENSE").write_text(notice, encoding="utf-8")


def _table_row(source: Source) -> str:
    url = LICENCE_URLS.get(source.licence)
    licence = f"[{source.licence}]({url})" if url else source.licence
    client = {"npm": "npm", "pip": "PyPI", "apt": "Debian 12"}[source.client]
    package = f"[{source.package}]({source.url}) {source.version} ({client})"
    where = f"`{source.folder}/` only" if source.folder else "anywhere"
    return f"| {source.key} | {package} | {licence} | {source.author} | {source.taken} | {where} |\n"
