"""Builds the pictures: icons of many artists for training, one unseen artist composed into pictures for evaluation."""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from .concepts import CONCEPTS, Concept
from .corpus import compose_image
from .records import Row, make_row, rng_for
from .sources import SHARE_ALIKE_FOLDER, SOURCE_OF_KEY

ICON_SIZE = 64
QUESTION = "What is in the picture?"
TRAIN_ARTISTS = (
    "noto",
    "noto-v1",
    "twemoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
    "emojione",
    "emojione-monotone",
    "streamline-emojis",
)
HELDOUT_ARTIST = "openmoji"  # outlines: the artist whose pictures resemble the others' pixels least
HELDOUT_VIDEO_ARTIST = "fxemoji"  # seen neither in the training pictures nor in the training videos
ICONS_PER_CONCEPT = 2
HELDOUT_VARIANTS = 2

Icons = dict[tuple[str, str], list[Image.Image]]


def read_icons(package: Path, artist: str) -> dict[str, list[Image.Image]]:
    """Renders the icons of every concept the artist has drawn, at most `ICONS_PER_CONCEPT` each.

    Args:
        package: the npm tarball of the icon set.

    Raises:
        DataError: the package states another licence than the pinned one.
    """
    with tarfile.open(package) as archive:
        info = json.load(_member(archive, "package/info.json"))
        icon_set = json.load(_member(archive, "package/icons.json"))
    stated, pinned = info["license"]["spdx"], SOURCE_OF_KEY[artist].licence
    if stated != pinned:
        raise DataError(f"{package} states licence {stated!r} but {pinned!r} is pinned; check what changed")
    names = {_plain_name(name): name for name in reversed([*icon_set["icons"], *icon_set.get("aliases", {})])}
    return {
        concept.word: drawings
        for concept in CONCEPTS
        if (drawings := [_render(icon_set, name) for name in _icon_names(concept, icon_set, names)])
    }


def _member(archive: tarfile.TarFile, name: str) -> Any:
    member = archive.extractfile(name)
    if member is None:
        raise DataError(f"{archive.name!s} holds no {name}; the package has another layout than expected")
    return member


def _plain_name(name: str) -> str:
    return re.sub(r"-\d+$", "", name).replace("-", "")


def _icon_names(concept: Concept, icon_set: dict[str, Any], names: dict[str, str]) -> list[str]:
    chosen: list[str] = []
    for wanted in concept.icons:
        name = names.get(_plain_name(wanted))
        if name is None:
            continue
        drawing = icon_set.get("aliases", {}).get(name, {}).get("parent", name)
        if drawing in icon_set["icons"] and drawing not in chosen:
            chosen.append(drawing)
    return chosen[:ICONS_PER_CONCEPT]


def _render(icon_set: dict[str, Any], name: str) -> Image.Image:
    import resvg_py

    icon = icon_set["icons"][name]
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    body = icon["body"].replace("currentColor", "#202020")
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{ICON_SIZE}" height="{ICON_SIZE}">{body}</svg>'
    )
    drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    return drawing if drawing.size == (ICON_SIZE, ICON_SIZE) else drawing.resize((ICON_SIZE, ICON_SIZE))


def build_images(out: Path, files: dict[str, Path]) -> tuple[list[Row], Icons]:
    """Writes all pictures and returns their samples and the icons the videos are made of.

    Args:
        out: root of the corpus.
        files: the fetched package of each source, by key.

    Returns:
        The samples (paths relative to `out`, held-out ones to its share-alike folder), and the icons by
        (word, artist), including the held-out video artist's.
    """
    icons: Icons = {}
    rows: list[Row] = []
    for artist in (*TRAIN_ARTISTS, HELDOUT_VIDEO_ARTIST, HELDOUT_ARTIST):
        for word, drawings in read_icons(files[artist], artist).items():
            if artist == HELDOUT_ARTIST:
                rows += write_heldout_pictures(out / SHARE_ALIKE_FOLDER, word, drawings[0])
                continue
            icons[word, artist] = drawings
            if artist in TRAIN_ARTISTS:
                rows += _write_icons(out, word, artist, drawings)
    return rows, icons


def _write_icons(out: Path, word: str, artist: str, drawings: list[Image.Image]) -> list[Row]:
    rows = []
    for number, drawing in enumerate(drawings):
        suffix = "" if number == 0 else f"-{number + 1}"
        path = f"images/{word}_{artist}{suffix}.png"
        (out / "images").mkdir(parents=True, exist_ok=True)
        # 96 colours (with transparency) change a pixel by 1/255 on average and halve the file
        palette = drawing.quantize(96, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        palette.save(out / path, optimize=True)
        source = {"set": artist}
        rows.append(
            make_row(
                f"image-{word}-{artist}{suffix}", "image", "image", "train", QUESTION, word, source, ("image", path)
            )
        )
    return rows


def write_heldout_pictures(folder: Path, word: str, drawing: Image.Image) -> list[Row]:
    """Composes the fixed held-out pictures of one concept into `folder`/images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for variant in range(HELDOUT_VARIANTS):
        path = f"images/{word}_{HELDOUT_ARTIST}_{variant}.png"
        picture = compose_image(drawing, rng_for("heldout-picture", word, str(variant)))
        picture.save(folder / path, optimize=True)
        identity = f"image-{word}-{HELDOUT_ARTIST}-{variant}"
        source = {"set": HELDOUT_ARTIST}
        rows.append(make_row(identity, "image", "image", "heldout", QUESTION, word, source, ("image", path)))
    return rows
