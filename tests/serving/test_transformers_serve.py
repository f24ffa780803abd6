"""`transformers serve` itself, in a process that knows nothing of this package, serves a folder of ours."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from chat_parts import AUDIO, IMAGE, QUESTION, ask, ask_streaming, free_port, many_questions, own_answer, save_model

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    """A client of one server, started with continuous batching, which transformers has for texts."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--continuous-batching"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "code"), "HF_HUB_OFFLINE": "1"}
    log = folder.parent / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        while not _answers(f"http://127.0.0.1:{port}/health"):
            try:
                server.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(log.read_text()[-2000:])
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert "Falling back to sequential generation" in log.read_text()


def _answers(address: str) -> bool:
    try:
        return bool(httpx.get(address).is_success)
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize(
    "content", [[IMAGE, QUESTION], [AUDIO, QUESTION], "What is it?"], ids=["image", "audio", "text"]
)
def test_the_answer_is_the_models_own_whole_and_streamed(client: Any, folder: Path, content: Any) -> None:
    expected = own_answer(folder, content)
    assert ask(client, folder, content) == expected
    # A stream leaves out a last character of which only some bytes came.
    assert ask_streaming(client, folder, content) == expected.rstrip("\N{REPLACEMENT CHARACTER}")


def test_sixteen_at_once_are_answered_as_one_by_one(client: Any, folder: Path) -> None:
    questions = many_questions()
    with ThreadPoolExecutor(16) as threads:
        at_once = list(threads.map(lambda question: ask(client, folder, question), questions))
    assert at_once == [ask(client, folder, question) for question in questions]
    assert len(set(at_once)) > 8
