"""A tiny model that has learned a held-out icon, a spoken word, a song without end and some HTML, for tests of the demo."""

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tiny_training
import torch

from unimoe import UniMoeForCausalLM
from unimoe.demo.server import DemoServer
from unimoe.demo.settings import DemoSettings
from unimoe.processing.processing_unimoe import UniMoeProcessor
from unimoe.starter_corpus.corpus import load_samples
from unimoe.trainers.data.collator import RawCollator

ICON, WORD = "image-rocket-openmoji-0", "speech-penguin_flite-awb"
ICON_ANSWER, WORD_ANSWER = "rocket", "penguin"
SONG, MARKUP = "Sing!", "Mark it up!"
MARKED_UP = "<b>x</b><img src=x onerror=document.title='hacked'>"
END, CONTEXT = "<|im_end|>", 4096


def learned_samples() -> list[dict[str, Any]]:
    """The icon and the word of the starter corpus's held-out part, the song, and HTML that acts."""
    corpus = {sample["id"]: sample for sample in load_samples("heldout")}
    song = tiny_training.sample("text", 0, None, SONG, "la " * 12)
    return [corpus[ICON], corpus[WORD], song, tiny_training.sample("text", 1, None, MARKUP, MARKED_UP)]


def medium_of(sample: dict[str, Any]) -> str:
    """The file that a sample asks about."""
    [path] = [item["path"] for item in sample["messages"][0]["content"] if item["type"] != "text"]
    return path


def save_model(folder: Path, steps: int = 40) -> Path:
    """A model folder; without steps its answers mean nothing."""
    processor = tiny_training.processor()
    model = tiny_training.model(processor, sparse=True, max_position_embeddings=CONTEXT)
    if steps:
        _learn(model, processor, steps)
        model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(END)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _learn(model: UniMoeForCausalLM, processor: UniMoeProcessor, steps: int) -> None:
    icon, word, song, markup = learned_samples()
    # Apart, or the many tokens of the texts would outweigh the other answers' ends.
    both = {**icon, "id": "both", "messages": icon["messages"] + word["messages"]}
    batches = [_inputs(processor, [icon, word, both]), _inputs(processor, [song, markup])]
    song_labels = batches[1]["labels"][0]
    song_labels[song_labels == processor.tokenizer.convert_tokens_to_ids(END)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(**batch).loss for batch in batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _inputs(processor: UniMoeProcessor, samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = RawCollator(processor)(samples)
    return {name: value for name, value in batch.items() if name not in ("sample_ids", "group", "logits_to_keep")}


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[tuple[str, DemoServer]]:
    """Address and server of a demo in a thread of its own; it must log no error, and stop in order while a page is open."""
    logged = _Records()
    logging.getLogger("uvicorn.error").addHandler(logged)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = DemoServer(DemoSettings(str(folder), port=port, device="cpu", **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.server.started:
            thread.join(0.02)
            assert thread.is_alive()
        yield f"http://127.0.0.1:{port}", server
        with httpx.stream("GET", f"http://127.0.0.1:{port}/gradio_api/heartbeat/page", timeout=30) as page:
            assert next(page.iter_lines()) == "data: ALIVE"
            server.stop()
            thread.join(30)
    finally:
        server.stop()
        thread.join(30)
        server.close()
        logging.getLogger("uvicorn.error").removeHandler(logged)
    assert not thread.is_alive()
    assert logged.errors == []


class _Records(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(record.getMessage())
