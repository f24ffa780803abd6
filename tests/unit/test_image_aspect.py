"""`image_aspect_ratio`: pictures on a square of the mean colour before they are resized, wherever pixels are made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny
import tiny_media
import tiny_training
import tiny_unimoe
import torch
from transformers import SiglipVisionConfig

from unimoe.conversion.dense.prepared_tokenizers import prepare_bunny_tokenizer
from unimoe.conversion.released.bunny_processor import (
    build_bunny_processor,
    siglip_image_processor,
)
from unimoe.conversion.released.export_unimoe import export_unimoe
from unimoe.conversion.released.import_unimoe import plan_import
from unimoe.errors import OptionError
from unimoe.processing.media_inputs_unimoe import padded_to_square
from unimoe.processing.processing_unimoe import UniMoeProcessor
from unimoe.trainers.caches.encoder_cache import EncoderCache

CLIP_COLOUR = (122, 116, 104)  # int(255 * mean)
SHAPES = [(7, 20), (21, 6), (9, 9), (1, 30), (13, 12)]


def question(picture: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]


def pixels(processor: UniMoeProcessor, pictures: list[Any], **options: Any) -> torch.Tensor:
    batch = processor(images=pictures, text=["<image>"] * len(pictures), return_tensors="pt", **options)
    return batch["pixel_values"]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pictures_stand_in_the_middle(height: int, width: int) -> None:
    array = tiny_media.picture(height=height, width=width)
    square = np.asarray(padded_to_square(PIL.Image.fromarray(array), [0.48145466, 0.4578275, 0.40821073]))
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = CLIP_COLOUR
    expected[top : top + height, left : left + width] = array
    assert np.array_equal(square, expected)


@pytest.mark.parametrize("kind", ["clip", "siglip", "fast siglip"])
def test_padded_pixels_are_those_of_the_padded_picture(kind: str) -> None:
    if kind == "fast siglip":
        pytest.importorskip("torchvision")
        from transformers import SiglipImageProcessor

        made: Any = SiglipImageProcessor(**siglip_image_processor(16).to_dict())
    else:
        made = tiny_media.image_processor() if kind == "clip" else siglip_image_processor(16)
    square, pad = (
        tiny_media.processor("image", image_processor=made, image_aspect_ratio=name) for name in ("square", "pad")
    )
    pictures = [tiny_media.picture(i, *shape) for i, shape in enumerate(SHAPES)]
    by_hand = [padded_to_square(PIL.Image.fromarray(picture), made.image_mean) for picture in pictures]
    assert torch.equal(pixels(pad, pictures), pixels(square, by_hand))
    assert pixels(pad, pictures).shape == (5, 3, 16, 16)
    chat = pad.apply_chat_template(
        [question(picture) for picture in pictures], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(chat["pixel_values"], pixels(pad, pictures))
    differs = (pixels(pad, pictures) != pixels(square, pictures)).flatten(1).any(dim=1)
    assert differs.tolist() == [height != width for height, width in SHAPES]


def test_what_is_padded_becomes_nearly_zero() -> None:
    pad = tiny_media.processor("image", image_processor=siglip_image_processor(16), image_aspect_ratio="pad")
    white = np.full((4, 16, 3), 255, np.uint8)
    image = pixels(pad, [white])[0]
    assert image[:, :5].abs().max() < 0.005
    assert torch.equal(image[:, 7:9], torch.ones(3, 2, 16))


def test_the_choice_is_saved_and_checked(tmp_path: Path) -> None:
    tiny_media.processor("image", image_aspect_ratio="pad").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["image_aspect_ratio"] == "pad"
    assert UniMoeProcessor.from_pretrained(tmp_path).image_aspect_ratio == "pad"
    assert tiny_media.processor("image").image_aspect_ratio == "square"
    with pytest.raises(OptionError, match="image_aspect_ratio is 'anyres'; use 'square' or 'pad'"):
        tiny_media.processor("image", image_aspect_ratio="anyres")
    colourless = tiny_media.processor("image", image_aspect_ratio="pad")
    colourless.image_processor.image_mean = None
    with pytest.raises(OptionError, match="has no image_mean"):
        pixels(colourless, [tiny_media.picture()])


def test_cached_states_are_those_of_padded_pictures(tmp_path: Path) -> None:
    file = tmp_path / "wide.png"
    PIL.Image.fromarray(tiny_media.picture(height=8, width=32)).save(file)
    processor = tiny_training.processor()
    model = tiny_training.model(processor)
    states = {}
    for name in ("square", "pad"):
        processor.image_aspect_ratio = name
        cache = EncoderCache(tmp_path / "cache", model, processor)
        sample = tiny_training.sample("image", 0, {"type": "image", "path": str(file)}, "What?", "A")
        cache.build([sample])
        states[name] = cache.states(sample)["image"][0]
        with torch.no_grad():
            expected = model.model.encode_image(pixels(processor, [str(file)]))[0]
        torch.testing.assert_close(states[name].float(), expected.float(), rtol=1e-2, atol=1e-2)
    assert not torch.equal(states["square"], states["pad"])


@pytest.mark.parametrize(("written", "ours"), [("pad", "pad"), ("square", "square"), ("anyres", "square")])
def test_uni_moes_converter_reads_it(tmp_path: Path, written: str, ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_unimoe.released(tmp_path, finetuned=False)
    config = source.folders.base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_aspect_ratio": written}))
    for folder, settings in (("clip", tiny_media.image_processor().to_dict()), ("whisper", {"feature_size": 80})):
        (tmp_path / "released" / folder / "preprocessor_config.json").write_text(json.dumps(settings))
    # The tiny tokenizer has more pieces than the tiny model embeds; no token is looked up here.
    monkeypatch.setattr("unimoe.conversion.released.import_unimoe.require_fitting_tokenizer", lambda *_: None)
    tiny_media.tokenizer().save_pretrained(source.folders.base)
    plan = plan_import(source.folders)
    assert plan.processor.image_aspect_ratio == ours
    assert not any("aspect" in note for note in plan.notes)
    plan.processor.save_pretrained(source.ours)
    export_unimoe(source.ours, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "base" / "config.json").read_text())["image_aspect_ratio"] == ours


# ---- the processor of a MoIIE model


@pytest.mark.parametrize("scales", [None, [1, 2, 3]])
def test_the_processor_of_a_moiie_model(scales: list[int] | None) -> None:
    vision = SiglipVisionConfig(image_size=28, patch_size=14)
    config = tiny.config(vision_config=vision, vision_feature_select_strategy="full")
    config.vision_scales = scales
    tokenizer = tiny_media.tokenizer()
    tokenizer.add_tokens(["<|end_of_text|>"], special_tokens=True)
    made = build_bunny_processor(config, prepare_bunny_tokenizer(tokenizer, "llama"), "llama")
    side = 28 if scales is None else 84
    assert pixels(made, [tiny_media.picture()]).shape == (1, 3, side, side)
    assert (made.image_tokens, made.image_aspect_ratio) == (4, "pad")
    assert made.tokenizer.pad_token == made.tokenizer.eos_token == "<|end_of_text|>"
    prompt = made.apply_chat_template(question(tiny_media.picture()), add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\nWhat?ASSISTANT:")


def test_padding_tokens() -> None:
    made = prepare_bunny_tokenizer(tiny_media.tokenizer(), "phi3")
    assert made.pad_token == "<unk>"
    made = tiny_media.tokenizer()
    made.pad_token = "</s>"
    assert prepare_bunny_tokenizer(made, "phi3").pad_token == "</s>"
