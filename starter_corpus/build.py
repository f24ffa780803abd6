"""Builds the starter corpus: `python -m unimoe.starter_corpus.build --sources DIR --out DIR`.

Needs npm, apt-get and dpkg-deb (Debian 12), and from PyPI resvg_py, onnxruntime, soundfile, soxr and av. Downloads
are kept in --sources and checked against pinned digests. Building again gives the same files as long as libsndfile,
x264, Pillow and resvg have the same versions.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from .attribution import write_attribution
from .build_images import build_images
from .build_sounds import build_sounds
from .build_speech import build_speech
from .build_videos import build_videos
from .corpus import CHECKSUM_FILE, SHARE_ALIKE_FOLDER, corpus_root, file_digest
from .described_media import described_questions
from .records import Row, answer_of, conversation, question_of
from .sources import SOURCE_OF_KEY, check_licences, fetch_sources
from .text_questions import build_text_questions
from .text_sentences import all_sentences

MEDIA_FOLDERS = ("images", "speech", "sounds", "videos", f"{SHARE_ALIKE_FOLDER}/images")
JSON_FILES = ("train.jsonl", "heldout.jsonl", f"{SHARE_ALIKE_FOLDER}/heldout.jsonl", "stage0.jsonl")
NOTICES = ("ATTRIBUTION.md", f"{SHARE_ALIKE_FOLDER}/LICENSE")


def build(sources: Path, out: Path) -> list[Row]:
    """Builds everything into `out`, replacing the built files that are there.

    Args:
        sources: folder for the downloaded packages and what is unpacked of them.
        out: root of the corpus.

    Raises:
        DataError: a licence is not allowed, or a download is not the pinned one.
    """
    check_licences()
    files = fetch_sources(sources)
    for folder in MEDIA_FOLDERS:
        shutil.rmtree(out / folder, ignore_errors=True)
    rows, icons = build_images(out, files)
    rows += build_speech(out, files, sources / "unpacked")
    rows += build_sounds(out, files, sources / "unpacked" / "fluid")
    rows += build_videos(out, icons)
    rows += build_text_questions()
    write_text_files(out, rows)
    write_attribution(out)
    write_checksums(out)
    return rows


def write_text_files(out: Path, rows: list[Row]) -> None:
    """Writes the JSON lines of all splits and of stage 0."""
    train = [row for row in rows if row["split"] == "train"]
    heldout = [row for row in rows if row["split"] == "heldout"]
    share_alike = [row for row in heldout if _is_share_alike(row)]
    plain = [row for row in heldout if not _is_share_alike(row)]
    texts = (train, plain, share_alike, stage0_rows(train))
    for name, lines in zip(JSON_FILES, texts, strict=True):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("".join(_json_line(line) for line in lines), encoding="utf-8")


def _is_share_alike(row: Row) -> bool:
    source = SOURCE_OF_KEY.get(row["source"]["set"])
    return source is not None and source.folder == SHARE_ALIKE_FOLDER


def stage0_rows(train: list[Row]) -> list[Row]:
    """Plain sentences, described media with questions, and the training text questions."""
    rows: list[Row] = [{"text": text} for text in all_sentences()]
    questions = list(described_questions())
    questions += [("text", question_of(row), answer_of(row)) for row in train if row["task"] == "text"]
    for task, question, answer in questions:
        messages = conversation([{"type": "text", "text": question}], answer)
        rows.append({"modality": "text", "task": task, "messages": messages})
    return rows


def _json_line(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def write_checksums(out: Path) -> None:
    """Writes the SHA-256 of every built file."""
    paths = [out / name for name in (*JSON_FILES, *NOTICES)]
    paths += sorted(path for folder in MEDIA_FOLDERS for path in (out / folder).iterdir())
    lines = [f"{file_digest(path)}  {path.relative_to(out).as_posix()}\n" for path in paths]
    (out / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the unimoe starter corpus.")
    parser.add_argument("--sources", type=Path, required=True, help="folder for downloads (about 250 MB)")
    parser.add_argument("--out", type=Path, default=corpus_root(), help="folder of the corpus")
    arguments = parser.parse_args()
    rows = build(arguments.sources.resolve(), arguments.out.resolve())
    print(f"{len(rows)} samples in {arguments.out}")


if __name__ == "__main__":
    main()
