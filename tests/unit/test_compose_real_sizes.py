"""runs/unimoe_7b: its two compositions at their real sizes, planned in seconds; the files hold shapes and no values."""

import json
from pathlib import Path
from typing import Any

import pytest
import released_shapes as real
import tiny_media
import torch
from released_shapes import AUDIO_TOWER, VISION_TOWER, Shape
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from unimoe import UniMoeBeatsConfig
from unimoe.conversion.checkpoints.parameters import count_parameters, total_and_active
from unimoe.conversion.composing.compose import ComposeOptions, CompositionPlan, Ingredients, plan_composition

ROWS, IMAGE = 32_064, 32_000
README = (Path(__file__).parents[2] / "runs" / "unimoe_7b" / "README.md").read_text(encoding="utf-8")


def save(file: Path, shapes: dict[str, Shape], **beside: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.zeros((), dtype=torch.float16).expand(shape) for name, shape in shapes.items()}
    torch.save({"model": tensors, **beside} if beside else tensors, file)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5-7B under the names of its file on the Hub."""
    folder = tmp_path_factory.mktemp("llava")
    decoder = {name: shape for name, shape in real.decoder(range(0)).items() if "inv_freq" not in name}
    grown = {name: (ROWS, *shape[1:]) if shape[0] == 32_000 else shape for name, shape in decoder.items()}
    shapes = {f"language_model.{name}": shape for name, shape in grown.items()}
    shapes |= {name.replace(VISION_TOWER, "vision_tower."): shape for name, shape in real.vision().items()}
    places = {"0": "linear_1", "2": "linear_2"}
    for name, shape in real.projector().items():
        number, kind = name.split(".")[-2:]
        shapes[f"multi_modal_projector.{places[number]}.{kind}"] = shape
    save(folder / "pytorch_model.bin", shapes)
    sizes = {"hidden_size": real.HIDDEN, "intermediate_size": real.INNER, "num_hidden_layers": real.LAYERS}
    text = LlamaConfig(**sizes, vocab_size=ROWS, num_attention_heads=32, max_position_embeddings=4096)
    LlavaConfig(vision_config=real.CLIP, text_config=text, image_token_index=IMAGE).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(folder)
    tiny_media.plain_tokenizer(metaspace=True).save_pretrained(folder)
    return folder


def check(plan: CompositionPlan, total: int, new: int, features: dict[str, int]) -> None:
    assert total_and_active(count_parameters(plan.config)).total == total
    assert plan.parameters_new == new
    assert plan.features == {"image": 576, "video": 576, **features}
    assert {output.dtype for output in plan.outputs} == {torch.float16}
    assert f"| {total / 1e9:.2f} " in README


def test_start_speech(llava: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in WhisperForConditionalGeneration(real.WHISPER).state_dict().items()}
    save(tmp_path / "pytorch_model.bin", {n: shape for n, shape in shapes.items() if n != "proj_out.weight"})
    real.WHISPER.save_pretrained(tmp_path)
    WhisperFeatureExtractor().save_pretrained(tmp_path)
    plan = plan_composition(Ingredients(str(llava), speech_tower=str(tmp_path)))
    check(plan, 7_268_517_888, 768 * 50 + 769 * 4096, {"speech": 50})
    assert plan.processor.feature_extractor.window_seconds == 30


def test_start_sound(llava: Path, tmp_path: Path) -> None:
    beats = {n.removeprefix(AUDIO_TOWER): shape for n, shape in real.sound().items() if n.startswith(AUDIO_TOWER)}
    save(tmp_path / "BEATs.pt", beats, cfg=UniMoeBeatsConfig().to_original())
    plan = plan_composition(Ingredients(str(llava), beats=tmp_path / "BEATs.pt"), ComposeOptions())
    check(plan, 7_256_166_384, 99_239_424 + 768 * 50 + 769 * 4096, {"sound": 50})
    assert json.loads(json.dumps(plan.config.sound_connector.qformer_config)) == {"encoder_hidden_size": 768}
