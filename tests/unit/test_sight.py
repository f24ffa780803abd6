"""Vision models that look at images while people ask: which they are, in chat, in pipelines and when served."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_media
import tiny_moai
import tiny_training
import torch

from unimoe import UniMoeForCausalLM, UniMoeProcessor, cli
from unimoe.errors import DataError, OptionError
from unimoe.processing.perception.choice import PERCEPTION_FILE, PerceiverChoice, original_models
from unimoe.processing.perception.on_the_fly import perceive_images
from unimoe.processing.perception.perceiver import Perceiver
from unimoe.processing.perception.results import Segment, Segmentation, TextLine
from unimoe.serving.sight import let_perceive
from unimoe.trainers.caches.perceived import keep_perception
from unimoe.trainers.caches.perception_cache import PerceptionCache

TEXT = PerceiverChoice(text=True)


class Widths:
    """Reads the width of an image; its left half is a segment."""

    def __init__(self) -> None:
        self.images = 0

    def identity(self) -> dict[str, Any]:
        return {"adapter": "widths"}

    def read(self, images: Any) -> list[tuple[TextLine, ...]]:
        self.images += len(images)
        return [(TextLine(f"width {image.width}", 0.99),) for image in images]

    def segment(self, images: Any) -> list[Segmentation]:
        maps = [np.tile(np.arange(image.width) < image.width // 2, (image.height, 1)) for image in images]
        return [Segmentation(one.astype(np.int32), (Segment(1, "sky"),)) for one in maps]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with mixers."""
    folder = tmp_path_factory.mktemp("mixed") / "model"
    processor = tiny_training.processor()
    tiny_training.model(processor, mixer_config=tiny_moai.MIXER, initializer_range=0.3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(width: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(tiny_media.picture(width=width))


def question(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*items, {"type": "text", "text": "What is it?"}]}]


def inputs(processor: UniMoeProcessor, conversations: Any) -> Any:
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def told(width: int) -> str:
    return f"The image includes text descriptions: width {width}."


def test_aux_without_words_are_ids_too() -> None:
    found = inputs(tiny_training.processor(), [question({"type": "image", "image": picture(20), "aux": ""})])
    assert found["aux_input_ids"].dtype == found["aux_attention_mask"].dtype == torch.long


def test_images_without_aux_are_looked_at_once() -> None:
    processor, reader = tiny_training.processor(), Widths()
    perceive_images(processor, Perceiver(reader=reader))
    images = [{"type": "image", "image": picture(width)} for width in (20, 30)]
    own = {**images[0], "aux": "A sign."}
    found = inputs(processor, [question(images[0]), question(*images), question(own)])
    texts = [
        processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(found["aux_input_ids"], found["aux_attention_mask"], strict=True)
    ]
    assert texts == [told(20), f"{told(20)} {told(30)}", "A sign."]
    assert reader.images == 2
    inputs(processor, question(images[1]))
    assert reader.images == 2
    assert "perceive" not in processor.to_dict()


def test_a_conversation_gets_the_map_of_its_first_image() -> None:
    processor = tiny_training.processor()
    perceive_images(processor, Perceiver(segmenter=Widths()))
    first, second = ({"type": "image", "image": picture(width)} for width in (20, 30))
    both = inputs(processor, question(first, second))
    assert both["aux_pixel_values"].equal(inputs(processor, question(first))["aux_pixel_values"])
    given = inputs(processor, question({**second, "aux": {"text": "", "map": picture(16)}}, first))
    assert given["aux_pixel_values"].shape[0] == 1
    assert not given["aux_pixel_values"].equal(both["aux_pixel_values"])


def test_a_choice_is_kept_in_a_folder(tmp_path: Path) -> None:
    assert PerceiverChoice.of_folder(tmp_path) is None
    choice = PerceiverChoice("a/b", "c/d", ("stop sign",), "rules", True, 320)
    choice.save(tmp_path)
    assert PerceiverChoice.of_folder(tmp_path) == choice
    assert choice.lines() == ["segments: a/b", "objects: c/d", "relations: rules", "text: rapidocr"]
    made = choice.perceiver()
    assert (made.segmenter.pretrained.name, made.detector.names, made.reader.detection_side) == (
        "a/b",
        ("stop sign",),
        320,
    )
    assert made.stretch_to is None
    assert original_models().perceiver().stretch_to == 490
    assert PerceiverChoice().perceiver() == Perceiver()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"text": "yes"}', '{"segment": 1}', '{"eyes": "a/b"}', '{"segment": "\\u001b[2J"}']
)
def test_a_damaged_choice_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / PERCEPTION_FILE).write_text(content)
    with pytest.raises(DataError, match=f"{PERCEPTION_FILE} is damaged"):
        PerceiverChoice.of_folder(tmp_path)


def test_trained_models_keep_what_they_were_told_by(tmp_path: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    for made in (start, out):
        made.mkdir()
    assert keep_perception(start, None, out) == {}
    TEXT.save(start)
    assert "text: rapidocr" in keep_perception(start, None, out)["Perception"]
    cache = PerceptionCache.create(tmp_path / "seen", {"adapter": "none"}, "nobody")
    assert keep_perception(start, tmp_path / "seen", out) == {}
    replace(TEXT, text_side=320).save(cache.folder)
    keep_perception(start, tmp_path / "seen", out)
    assert PerceiverChoice.of_folder(out) == replace(TEXT, text_side=320)


def test_who_looks_is_said(folder: Path) -> None:
    model, processor = UniMoeForCausalLM.from_pretrained(folder), UniMoeProcessor.from_pretrained(folder)
    assert "it answers from images alone" in str(let_perceive(str(folder), model, processor))
    assert let_perceive(str(folder), model, processor, without=True) is None
    assert getattr(processor, "perceive", None) is None
    assert "(text: rapidocr)" in str(let_perceive(str(folder), model, processor, TEXT))
    assert processor.perceive is not None
    with pytest.raises(OptionError, match="exclude each other"):
        let_perceive(str(folder), model, processor, TEXT, without=True)
    plain = tiny_training.model(processor)
    assert let_perceive("plain", plain, processor) is None
    with pytest.raises(OptionError, match="plain has no mixers"):
        let_perceive("plain", plain, processor, TEXT)


@pytest.fixture
def looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder names a perceiver, which is a quick one."""
    TEXT.save(folder)
    reader = Widths()
    monkeypatch.setattr(PerceiverChoice, "perceiver", lambda *_, **__: Perceiver(reader=reader))
    yield reader
    (folder / PERCEPTION_FILE).unlink()


def answer(folder: Path, item: dict[str, Any]) -> str:
    model, processor = UniMoeForCausalLM.from_pretrained(folder), UniMoeProcessor.from_pretrained(folder)
    batch = inputs(processor, question(item))
    output = model.generate(**batch, max_new_tokens=8, do_sample=False)
    return processor.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat_looks_at_images(
    folder: Path, looked_at: Widths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "a.png")
    picture(20).save(file)
    item = {"type": "image", "path": file}
    command = ["chat", str(folder), "--max-new-tokens", "8", "--image", file, "--once", "What is it?"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == answer(folder, {**item, "aux": told(20)}) + "\n"
    assert "are looked at" in printed.err
    assert cli.main([*command, "--no-perception"]) == 0
    assert capsys.readouterr().out == answer(folder, item) + "\n"
    assert looked_at.images == 1
    assert answer(folder, item) != answer(folder, {**item, "aux": told(20)})


def test_a_pipeline_looks_at_images(folder: Path, looked_at: Widths) -> None:
    from transformers import pipeline

    model, processor = UniMoeForCausalLM.from_pretrained(folder), UniMoeProcessor.from_pretrained(folder)
    perceive_images(processor, Perceiver(reader=looked_at))
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    item = {"type": "image", "image": picture(20)}
    found = ask(text=question(item), max_new_tokens=8, do_sample=False, return_full_text=False)
    assert found[0]["generated_text"] == answer(folder, {**item, "aux": told(20)})


def test_a_server_looks_at_images(folder: Path, looked_at: Widths) -> None:
    pytest.importorskip("fastapi")
    from unimoe.serving.server import ModelServer, ServerSettings

    server = ModelServer(ServerSettings(str(folder), device="cpu"))
    assert "text: rapidocr" in str(server.note)
    [loaded] = server._model_manager.loaded_models.values()
    later = inputs(loaded.processor, question({"type": "image", "image": picture(20)}))
    assert looked_at.images == 0
    with ThreadPoolExecutor(1) as executor:
        asyncio.run(later.made(executor))
    assert looked_at.images == 1


def test_evaluation_looks_at_images(folder: Path, looked_at: Widths) -> None:
    from unimoe.evaluation.running.answerers import open_answerer

    answerer = open_answerer(str(folder), "cpu")
    inputs(answerer.processor, question({"type": "image", "image": picture(20)}))
    assert looked_at.images == 1


def test_the_card_names_them(folder: Path) -> None:
    from unimoe.conversion.checkpoints.parameters import count_parameters
    from unimoe.conversion.publishing.model_card import model_card

    model = UniMoeForCausalLM.from_pretrained(folder)
    counted = count_parameters(model.config)
    assert "Which models is not recorded" in " ".join(model_card("m", model.config, counted).split())
    card = model_card("m", model.config, counted, sections={"Perception": TEXT.card_text()})
    assert "- text: rapidocr" in card
    assert "not recorded" not in card
    plain = tiny_training.model(tiny_training.processor()).config
    assert "Perception" not in model_card("m", plain, count_parameters(plain))


def test_perceive_leaves_its_choice_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unimoe.commands import perceive

    monkeypatch.setattr(perceive, "chosen_perceiver", lambda _: Perceiver(reader=Widths()))
    picture(20).save(tmp_path / "a.png")
    sample = tiny_training.sample("image", 0, {"type": "image", "path": "a.png"}, "What is it?", "a")
    (tmp_path / "data.jsonl").write_text(json.dumps(sample))
    command = ["perceive", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "seen"), "--text-side", "320"]
    assert cli.main(command) == 0
    assert PerceiverChoice.of_folder(PerceptionCache(tmp_path / "seen").folder) == replace(TEXT, text_side=320)
