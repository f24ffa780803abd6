"""`image_antialias=False`: pictures stretched without smoothing, as MoAI's demo reads them."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny_media
import tiny_training
import torch

from unimoe.conversion.released.moai_processor import moai_image_processor
from unimoe.errors import OptionError
from unimoe.processing.media_inputs_unimoe import stretched
from unimoe.processing.processing_unimoe import UniMoeProcessor
from unimoe.trainers.caches.encoder_cache import EncoderCache

SHAPES = [(7, 20), (61, 33), (16, 16), (40, 5)]


def pixels(processor: UniMoeProcessor, pictures: list[np.ndarray]) -> torch.Tensor:
    batch = processor(images=pictures, text=["<image>"] * len(pictures), return_tensors="pt")
    return batch["pixel_values"]


def bilinear_without_smoothing(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """From the definition: each new pixel's centre lies between four old ones, however far the next is."""
    places = []
    for new, old in ((height, picture.shape[0]), (width, picture.shape[1])):
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        places.append((low, np.minimum(low + 1, old - 1), place - low))
    (top, bottom, down), (left, right, along) = places
    down, along, picture = down[:, None, None], along[None, :, None], picture.astype(np.float64)
    upper = picture[top][:, left] * (1 - along) + picture[top][:, right] * along
    lower = picture[bottom][:, left] * (1 - along) + picture[bottom][:, right] * along
    return upper * (1 - down) + lower * down


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pixels_are_those_of_the_definition(height: int, width: int) -> None:
    picture = tiny_media.picture(height=height, width=width)
    found = np.asarray(stretched(PIL.Image.fromarray(picture), 16, 24))
    assert np.abs(found - bilinear_without_smoothing(picture, 16, 24)).max() <= 0.5 + 1e-4


def test_pixels_are_those_of_torchvision() -> None:
    """What the demo calls."""
    functional = pytest.importorskip("torchvision.transforms").functional
    picture = tiny_media.picture(height=61, width=33)
    expected = functional.resize(torch.from_numpy(picture).permute(2, 0, 1), [16, 16], antialias=False)
    assert np.array_equal(np.asarray(stretched(PIL.Image.fromarray(picture), 16, 16)), expected.permute(1, 2, 0))


def test_a_processor_normalises_what_was_stretched() -> None:
    made = moai_image_processor(16)
    smooth, plain = (
        tiny_media.processor("image", image_processor=made, image_antialias=antialias) for antialias in (True, False)
    )
    pictures = [tiny_media.picture(i, *shape) for i, shape in enumerate(SHAPES)]
    found = pixels(plain, pictures)
    mean, std = (torch.tensor(values)[:, None, None] for values in (made.image_mean, made.image_std))
    for row, picture in zip(found, pictures, strict=True):
        values = torch.from_numpy(np.array(stretched(PIL.Image.fromarray(picture), 16, 16))).permute(2, 0, 1)
        torch.testing.assert_close(row, (values - 255 * mean) / (255 * std), atol=1e-5, rtol=0)
    differs = (found != pixels(smooth, pictures)).flatten(1).any(dim=1)
    assert differs.tolist() == [shape != (16, 16) for shape in SHAPES]


def test_the_choice_is_saved_and_checked(tmp_path: Path) -> None:
    tiny_media.processor("image", image_antialias=False).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["image_antialias"] is False
    assert UniMoeProcessor.from_pretrained(tmp_path).image_antialias is False
    assert tiny_media.processor("image").image_antialias is True
    with pytest.raises(OptionError, match="image_antialias is 'no'; use true or false"):
        tiny_media.processor("image", image_antialias="no")
    cropping = tiny_media.processor("image", image_antialias=False)
    cropping.image_processor.size = {"shortest_edge": 16}
    with pytest.raises(OptionError, match=r"has the size \{'shortest_edge': 16\}: give it a height and a width"):
        pixels(cropping, [tiny_media.picture()])


def test_cached_states_are_those_of_the_stretched_picture(tmp_path: Path) -> None:
    file = tmp_path / "tall.png"
    PIL.Image.fromarray(tiny_media.picture(height=61, width=33)).save(file)
    processor = tiny_training.processor()
    processor.image_processor.size = {"height": 16, "width": 16}
    model = tiny_training.model(processor)
    sample = tiny_training.sample("image", 0, {"type": "image", "path": str(file)}, "What?", "A")
    states = []
    for processor.image_antialias in (True, False):
        cache = EncoderCache(tmp_path / "cache", model, processor)
        cache.build([sample])
        states.append(cache.states(sample)["image"][0])
    assert not torch.equal(*states)
