"""What chat and demo, evaluate and inspect do with the processor's outputs, and caches with a model's, on the stand-in.

Loading is not shown, since transformers builds models on "meta", as which the stand-in stands for CUDA; and `unimoe serve`
is not, whose handler runs in a thread of its own: it hands requests over as transformers' own server does.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import PIL.Image
import pytest
import tiny_media
import tiny_training
import torch
from cuda_stand_in import CudaStandIn
from safetensors.torch import load_file

from unimoe.evaluation.running.answerers import ChatAnswerer, TextAnswerer
from unimoe.evaluation.running.requests import Request
from unimoe.inspection.usage import measure_usage
from unimoe.serving import media_needs
from unimoe.serving.answering import Answerer
from unimoe.trainers.caches.encoder_cache import EncoderCache
from unimoe.trainers.data.conversations import ConversationDataset

PICTURE = {"type": "image", "image": PIL.Image.new("RGB", (20, 24), (200, 20, 20))}
SOUND = {"type": "audio", "audio": tiny_media.sound()}
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
PLACES = {"encoding_unimoe.py:place_features": 1}


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_training.processor()


@pytest.fixture
def model(processor: Any) -> Any:
    return tiny_training.model(processor, sparse=True)


def test_chat_and_demo_answer(processor: Any, model: Any) -> None:
    messages = [{"role": "user", "content": [PICTURE, SOUND, {"type": "text", "text": "What is it?"}]}]
    expected = Answerer(model, processor, OPTIONS)(messages, lambda piece: None)
    with CudaStandIn() as cuda, patch.object(media_needs, "free_memory", return_value=1 << 40):
        model.to("cuda")
        cuda.waits.clear()
        reply = Answerer(model, processor, OPTIONS)(messages, lambda piece: None)
    assert (reply.text, reply.load) == (expected.text, expected.load)
    assert cuda.ours() == PLACES | {"routing_statistics.py:read": 1}


def test_evaluate_answers(processor: Any, model: Any) -> None:
    requests = [
        Request("1", "Which?", (PICTURE,), letters="AB"),
        Request("2", "Which of them?", (PICTURE,), letters="ABC"),
    ]
    letters = [request.letters for request in requests]
    answerers = (ChatAnswerer(model, processor), TextAnswerer(model, processor.tokenizer))

    def answers() -> list[list[str]]:
        both = []
        for answerer in answerers:
            inputs = answerer.prepare(requests)
            both += [answerer.generate(inputs, 4), answerer.likeliest_letters(inputs, letters)]
        return both

    expected = answers()
    with CudaStandIn() as cuda:
        model.to("cuda")
        cuda.waits.clear()
        assert answers() == expected
    # Twice each; the logits of the letters come to the host in one piece.
    assert cuda.ours() == {"encoding_unimoe.py:place_features": 4, "answerers.py:_likeliest_letters": 2}


def test_inspect_counts(processor: Any, model: Any, tmp_path: Path) -> None:
    dataset = ConversationDataset.from_samples(tiny_training.samples(tmp_path, 2), media_root=tmp_path)
    expected = measure_usage(model, processor, dataset)
    with CudaStandIn() as cuda:
        model.to("cuda")
        cuda.waits.clear()
        usage = measure_usage(model, processor, dataset)
    assert torch.equal(usage.counts.chosen_NLMX, expected.counts.chosen_NLMX)
    assert usage.occurrences == expected.occurrences
    # For every batch: its inputs there, and which experts its tokens had back.
    batches = cuda.waits["usage.py:_note_words"]
    assert cuda.ours().keys() == {
        "usage.py:measure_usage",
        "usage.py:_note_words",
        "encoding_unimoe.py:place_features",
        "routing_statistics.py:read",
    }
    assert batches == len({sample["modality"] for sample in dataset.samples})


def test_caches_keep_the_towers_states_on_the_host(processor: Any, model: Any, tmp_path: Path) -> None:
    samples = tiny_training.samples(tmp_path, 1)
    dataset = ConversationDataset.from_samples(samples, media_root=tmp_path)
    on_cpu = EncoderCache(tmp_path / "cpu", model, processor)
    on_cpu.build(dataset.samples, progress=False)
    with CudaStandIn():
        cache = EncoderCache(tmp_path / "cuda", model.to("cuda"), processor)
        cache.build(dataset.samples, progress=False)
    files = sorted(file.relative_to(tmp_path / "cpu") for file in (tmp_path / "cpu").rglob("*.safetensors"))
    assert files
    for file in files:
        torch.testing.assert_close(load_file(tmp_path / "cuda" / file), load_file(tmp_path / "cpu" / file))
