"""Pictures of unusual depth and with transparency."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_media

from unimoe.processing.media_policy_unimoe import MediaError
from unimoe.processing.media_unimoe import load_image


def as_file(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_grey_keeps_its_shades(order: str) -> None:
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    sixteen = (eight.astype(np.uint16) * 257).astype(order)
    mode = "I;16" if order == "<u2" else "I;16B"
    made = PIL.Image.frombytes(mode, (16, 16), sixteen.tobytes())
    values: list[Any] = [made]
    if mode == "I;16":
        rows = b"P5 16 16 65535\n" + sixteen.astype(">u2").tobytes()
        values += [as_file(made), rows, PIL.Image.open(io.BytesIO(as_file(made))), PIL.Image.open(io.BytesIO(rows))]
    for value in values:
        assert np.array_equal(np.asarray(load_image(value)), np.stack([eight] * 3, axis=-1))


def test_hidden_shade_of_sixteen_bit_grey_is_white() -> None:
    made = PIL.Image.frombytes("I;16", (2, 1), np.array([0, 1], "<u2").tobytes())
    shown = np.asarray(load_image(as_file(made, transparency=1)))
    assert shown.tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_without_a_fixed_white_is_refused(mode: str) -> None:
    with pytest.raises(MediaError, match=rf"image at here: its mode '{mode}' .* convert it to mode 'L'"):
        load_image(PIL.Image.new(mode, (4, 4), 1), where="here")


def transparent() -> np.ndarray:
    """A hidden, a half hidden and three opaque pixels of red, [1, 5, 4]."""
    return np.array([[[255, 0, 0, alpha] for alpha in (0, 128, 255, 255, 255)]], np.uint8)


def test_transparent_pixels_are_white_however_they_come(tmp_path: Path) -> None:
    rgba = PIL.Image.fromarray(transparent())
    (tmp_path / "a.png").write_bytes(as_file(rgba))
    forms: list[Any] = [rgba, as_file(rgba), tmp_path / "a.png", transparent(), transparent().transpose(2, 0, 1)]
    forms += [transparent() / 255.0, as_file(rgba, "WEBP", lossless=True, exact=True)]
    for form in forms:
        assert np.asarray(load_image(form))[0, :3].tolist() == [[255, 255, 255], [255, 127, 127], [255, 0, 0]]
    assert np.array_equal(np.asarray(load_image(rgba, mode="RGBA")), transparent())


def test_transparency_of_other_modes_is_white() -> None:
    grey = PIL.Image.new("LA", (1, 1), (0, 0))
    palette = PIL.Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    colour = PIL.Image.new("RGB", (1, 1), (9, 8, 7))
    files = [as_file(grey), as_file(palette, "GIF", transparency=0), as_file(colour, transparency=(9, 8, 7))]
    for value in [grey, palette, *files]:
        assert load_image(value).getpixel((0, 0)) == (255, 255, 255)


def test_opaque_pictures_keep_every_value() -> None:
    picture = tiny_media.picture()
    opaque = np.concatenate([picture, np.full((*picture.shape[:2], 1), 255, np.uint8)], axis=-1)
    for value in (picture, opaque, PIL.Image.fromarray(opaque), as_file(PIL.Image.fromarray(opaque))):
        assert np.array_equal(np.asarray(load_image(value)), picture)
