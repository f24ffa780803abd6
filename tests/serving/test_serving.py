"""A tiny model is served on this machine; OpenAI's client and raw requests talk to it."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import tiny_media
from chat_parts import (
    AUDIO,
    IMAGE,
    QUESTION,
    ask,
    ask_streaming,
    data_url,
    free_port,
    many_questions,
    own_answer,
    save_model,
)

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from unimoe.errors import RequestError  # noqa: E402
from unimoe.processing import media_inputs_unimoe  # noqa: E402
from unimoe.serving.continuous import can_batch  # noqa: E402
from unimoe.serving.event_stream import finished  # noqa: E402
from unimoe.serving.request_checks import require_chat_request  # noqa: E402
from unimoe.serving.server import ModelServer, ServerSettings  # noqa: E402

NAME = "tiny"
BODY_LIMIT = 200_000


VIDEO = {"type": "video_url", "video_url": {"url": data_url(tiny_media.video(frames=5), "video/mp4")}}
LOUD_VIDEO = {"type": "video_url", "video_url": {"url": data_url(tiny_media.video(frames=5, track=True), "video/mp4")}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / NAME
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ModelServer]:
    settings = ServerSettings(
        str(folder), port=free_port(), device="cpu", longest_body=BODY_LIMIT, continuous_batching=can_batch()
    )
    server = ModelServer(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.server.started:
        thread.join(0.02)
        assert thread.is_alive()
    yield server
    server.stop()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(server: ModelServer) -> str:
    return f"http://127.0.0.1:{server.settings.port}"


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.parametrize(
    "content",
    [[IMAGE, QUESTION], [AUDIO, QUESTION], [VIDEO, QUESTION], [LOUD_VIDEO, QUESTION], [QUESTION], "What is it?"],
    ids=["image", "audio", "video", "video and its sound", "text part", "text"],
)
def test_the_answer_is_the_models_own(client: Any, folder: Path, content: Any) -> None:
    assert ask(client, folder, content) == own_answer(folder, content).lstrip()


@pytest.mark.parametrize("content", [[IMAGE, QUESTION], "What is it?"], ids=["image", "text"])
def test_streamed_pieces_make_the_whole_answer(client: Any, folder: Path, content: Any) -> None:
    # A stream leaves out a last character of which only some bytes came.
    whole = ask(client, folder, content).rstrip("\N{REPLACEMENT CHARACTER}")
    assert ask_streaming(client, folder, content) == whole


def test_a_stream_is_what_openais_clients_expect(address: str, folder: Path) -> None:
    body = {"messages": [MESSAGE], "stream": True, "max_tokens": 6}
    *events, end = httpx.post(f"{address}/v1/chat/completions", json=body).text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["model"] for chunk in chunks} == {str(folder)}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    body = {**body, "stream": False}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).json()["model"] == str(folder)


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ([" ", " a", " b"], "a b"),
        (["  \n", "", "a ", " b"], "a  b"),
        (["a", " "], "a "),
        ([" "], ""),
    ],
)
def test_streams_begin_with_a_word_and_end(sent: list[str], received: str) -> None:
    closed = []

    async def parts(together: bool) -> AsyncGenerator[str, None]:
        events = [{"role": "assistant"}, *({"content": text} for text in sent), {}]
        lines = [f"data: {json.dumps({'id': 'x', 'choices': [{'delta': delta}]})}\n\n" for delta in events]
        try:
            for part in ["".join(lines)] if together else lines:
                yield part
            yield 'data: {"error": "not "JSON""}\n\n'
        finally:
            closed.append(together)

    async def read(together: bool, most: int = 100) -> list[str]:
        read: list[str] = []
        async with aclosing(finished(parts(together))) as stream:
            async for part in stream:
                read.append(part)
                if len(read) == most:
                    break
        return read

    for together in (False, True):
        *events, error, end = "".join(asyncio.run(read(together))).removesuffix("\n\n").split("\n\n")
        deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas) == received
        assert deltas[0] == {"role": "assistant"}
        assert (error, end) == ('data: {"error": "not "JSON""}', "data: [DONE]")
    assert closed == [False, True]
    asyncio.run(read(False, most=1))
    assert closed == [False, True, False]  # whoever leaves ends the generation


def test_slow_media_hold_up_nobody_else(
    address: str, client: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    decode = media_inputs_unimoe.load_image

    def slowly(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return decode(*args)

    monkeypatch.setattr(media_inputs_unimoe, "load_image", slowly)
    with ThreadPoolExecutor(1) as others:
        slow = others.submit(ask, client, folder, [IMAGE, QUESTION])
        try:
            assert begun.wait(60)
            assert httpx.get(f"{address}/health", timeout=30).json() == {"status": "ok"}
            assert ask(client, folder, "What is it?", timeout=30)
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result(60) == own_answer(folder, [IMAGE, QUESTION]).lstrip()


def test_a_text_may_end_the_answer(client: Any, folder: Path) -> None:
    whole = ask(client, folder, [IMAGE, QUESTION])
    end = next(character for character in whole if character != "�")  # half characters cannot be asked for
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=str(folder),
            messages=[{"role": "user", "content": [IMAGE, QUESTION]}],
            max_tokens=6,
            stop=[end],
            stream=stream,
        )
        text = (
            "".join(p.choices[0].delta.content or "" for p in answer) if stream else answer.choices[0].message.content
        )
        assert len(text) <= whole.index(end) + len(end)


def test_sixteen_at_once_are_answered_as_one_by_one(client: Any, folder: Path) -> None:
    questions = many_questions()
    with ThreadPoolExecutor(16) as threads:
        at_once = list(threads.map(lambda question: ask(client, folder, question), questions))
    assert at_once == [ask(client, folder, question) for question in questions]
    assert len(set(at_once)) > 8


def test_texts_go_into_the_batch_and_media_past_it(
    server: ModelServer, client: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(client, folder, "What is it?")  # makes the batch
    batched: list[int] = []
    manager = server._generation_state.get_manager(f"{folder}@main", use_cb=True)._cb
    add = manager.add_request
    monkeypatch.setattr(
        manager, "add_request", lambda ids, **options: (batched.append(len(ids)), add(ids, **options))[1]
    )
    for options in ({}, {"temperature": 0}, {"stream": False, "n": 1}):
        ask(client, folder, "What is it?", **options)
    assert len(batched) == 3
    for options in ({"temperature": 1.0}, {"stop": ["q"]}, {"seed": 1}, {"top_p": 0.5}, {"frequency_penalty": 1.0}):
        ask(client, folder, "What is it?", **options)
    ask(client, folder, [IMAGE, QUESTION])
    assert len(batched) == 3


def test_a_seed_makes_the_same_answer_whatever_else_is_asked(client: Any, folder: Path) -> None:
    def draw(seed: int) -> str:
        return ask(client, folder, [IMAGE, QUESTION], temperature=1.5, seed=seed, max_tokens=12)

    seeds = [0, 1, 2, 3] * 2
    with ThreadPoolExecutor(8) as threads:
        drawn = list(threads.map(draw, seeds))
    assert drawn[:4] == drawn[4:]
    assert len(set(drawn)) == 4


def test_the_server_outlives_clients_that_leave_in_mid_stream(address: str, client: Any, folder: Path) -> None:
    expected = ask(client, folder, "What is it?"), ask(client, folder, [IMAGE, QUESTION])
    for content in ("What is it?", [IMAGE, QUESTION]):
        body = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": 200}
        for _ in range(3):
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as stream:
                next(stream.iter_lines())
    assert (ask(client, folder, "What is it?"), ask(client, folder, [IMAGE, QUESTION])) == expected
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_the_served_model_is_listed(client: Any, folder: Path) -> None:
    assert [model.id for model in client.models.list()] == [str(folder)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], "not a readable image"),
        ([{"type": "image_url", "image_url": {"url": __file__}}], "paths are refused"),
        ([{"type": "image_url", "image_url": {"url": f"file://{__file__}"}}], "refused"),
        ([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}], "off: .*data: URL.*--media-host"),
        ([{"type": "audio_url", "audio_url": {"url": data_url(b"RIFF", "audio/wav")}}], "audio"),
        ("word " * 300, "takes fewer than 256. Shorten it"),
    ],
)
def test_media_and_prompts_that_cannot_be_used(client: Any, folder: Path, content: Any, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        ask(client, folder, content)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b" " * (BODY_LIMIT + 1), 413, "longer than"),
        (b'{"messages": []}', 400, "at least one message"),
    ],
)
def test_bodies_that_are_no_request(address: str, body: bytes, status: int, reason: str) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", content=body)
    assert answer.status_code == status
    assert reason in answer.json()["error"]["message"]
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
def test_a_request_is_one_whatever_its_headers_call_it(address: str, kind: str | None) -> None:
    body = json.dumps({"messages": [MESSAGE], "max_tokens": 2}).encode()
    headers = {} if kind is None else {"content-type": kind}
    assert httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers).status_code == 200


def test_no_request_loads_or_unloads_models(address: str, client: Any, folder: Path) -> None:
    assert httpx.post(f"{address}/load_model", json={"model": "another"}).status_code == 404
    assert httpx.post(f"{address}/reset").status_code == 404
    with pytest.raises(openai.BadRequestError, match="pinned"):
        client.chat.completions.create(model="another", messages=[{"role": "user", "content": "Hi"}])


MESSAGE = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([], "it must be an object"),
        ({"messages": [MESSAGE, "Hi"]}, r"messages\[1\] must be an object"),
        ({"messages": [{"role": "boss", "content": "Hi"}]}, "one of system"),
        ({"messages": [{"role": "user", "content": 3}]}, "a text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'; it must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, r"image_url\.url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]},
            "format",
        ),
        ({"messages": [MESSAGE], "max_tokens": 0}, "whole number from 1 to 256"),
        ({"messages": [MESSAGE], "max_tokens": True}, "whole number"),
        ({"messages": [MESSAGE], "max_completion_tokens": 1000}, "from 1 to 256"),
        ({"messages": [MESSAGE], "temperature": float("nan")}, "from 0.01 to 2"),
        ({"messages": [MESSAGE], "temperature": 1e-300}, "from 0.01 to 2"),
        ({"messages": [MESSAGE], "frequency_penalty": -1}, "above -1"),
        ({"messages": [MESSAGE], "top_p": 0}, "above 0"),
        ({"messages": [MESSAGE], "n": 2}, "must be 1"),
        ({"messages": [MESSAGE], "stop": [1]}, "1 to 4 texts"),
        ({"messages": [MESSAGE], "stop": ["a"] * 5}, "1 to 4 texts"),
        ({"messages": [MESSAGE], "stop": "a" * 201}, "1 to 200 characters"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "must be a list"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "a name and arguments"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[]"}}]}
                ]
            },
            "object",
        ),
        ({"messages": [MESSAGE], "generation_config": "{}"}, "`generation_config` is not known here"),
        ({"messages": [MESSAGE], "logit_bias": {"x": "y"}}, "`logit_bias` is not known"),
        ({"messages": [MESSAGE], "seed": 10**30}, "63 bits"),
        ({"messages": [MESSAGE], "temperature": 10**400}, "from 0.01 to 2"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "must be one of"),
    ],
)
def test_fields_that_cannot_be(body: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        require_chat_request(body, longest_answer=256)


def test_the_longest_allowed_requests_pass() -> None:
    parts = [QUESTION, IMAGE, AUDIO, VIDEO]
    called = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "B"}]
    body = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}, *called, MESSAGE]}
    require_chat_request({**body, "max_tokens": 256, "temperature": 0, "top_p": 1, "stop": "x", "n": 1}, 256)
    assert json.dumps(body)
