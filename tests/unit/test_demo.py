"""The demo's server, talked to as its page does, and as somebody who means harm."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_demo
import tiny_media

httpx = pytest.importorskip("httpx")
pytest.importorskip("gradio")

UPLOAD_LIMIT, USERS = 300_000, 16
CHAT, PANEL = 1, 3
PNG = tiny_media.encoded_picture()


@dataclass
class Demo:
    """A running demo and what its page knows about its functions."""

    address: str
    server: Any
    functions: dict[str, int]
    box: int

    @property
    def folder(self) -> Path:
        return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tiny_demo.save_model(tmp_path_factory.mktemp("demo") / "tiny")
    options = {"max_new_tokens": 4000, "do_sample": False}
    with tiny_demo.serving(folder, options=options, max_users=USERS, max_upload_bytes=UPLOAD_LIMIT) as (
        address,
        server,
    ):
        config = httpx.get(f"{address}/config").json()
        [box] = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "box"]
        functions = {d["api_name"]: d["id"] for d in config["dependencies"]}
        yield Demo(address, server, functions, box)


class Visitor:
    """One open page."""

    def __init__(self, demo: Demo, name: str) -> None:
        self.demo, self.name = demo, name
        self.client = httpx.Client(base_url=demo.address, timeout=60)

    def upload(self, content: bytes, name: str) -> Any:
        return self.client.post("/gradio_api/upload", files={"files": (name, content)})

    def attached(self, content: bytes, name: str) -> dict[str, Any]:
        [path] = self.upload(content, name).json()
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, function: str, *data: Any) -> Any:
        call = {"fn_index": self.demo.functions[function], "session_hash": self.name, "data": list(data)}
        return self.client.post("/gradio_api/queue/join", json=call)

    def changes(self) -> Iterator[dict[str, Any]]:
        """What the server sends while something is answered, to its end."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def say(self, text: str, *files: dict[str, Any]) -> list[Any]:
        """What the page shows in the end: messages, chat, box, panel."""
        assert self.call("say", {"text": text, "files": list(files)}, False, None).status_code == 200
        [end] = [message for message in self.changes() if message["msg"] == "process_completed"]
        assert end["success"], end
        return end["output"]["data"]


def last_words(shown: list[Any]) -> str:
    return shown[CHAT][-1]["content"][0]["text"]


@pytest.fixture
def visitor(demo: Demo, request: pytest.FixtureRequest) -> Visitor:
    return Visitor(demo, f"visitor-{abs(hash(request.node.name))}")


def medium(number: int) -> bytes:
    return Path(tiny_demo.medium_of(tiny_demo.learned_samples()[number])).read_bytes()


def test_the_icon_and_the_word_are_answered_in_one_conversation(visitor: Visitor) -> None:
    shown = visitor.say("What is in the picture?", visitor.attached(medium(0), "icon.png"))
    assert last_words(shown) == tiny_demo.ICON_ANSWER
    assert [line in shown[PANEL] for line in (">text<", ">image<", ">speech<")] == [True, True, False]
    shown = visitor.say("What word is spoken?", visitor.attached(medium(1), "word.ogg"))
    assert len(shown[CHAT]) == 6, "a medium, a question and an answer, twice"
    assert [line in shown[PANEL] for line in (">image<", ">speech<", ">sound<")] == [True, True, True]
    visitor.call("begin_anew")
    [end] = [message for message in visitor.changes() if message["msg"] == "process_completed"]
    assert end["output"]["data"][CHAT] == []
    assert len(visitor.say("What word is spoken?", visitor.attached(medium(1), "word.ogg"))[CHAT]) == 3


def test_an_example_is_answered_whatever_a_browser_says_of_it(visitor: Visitor) -> None:
    event = {"index": 0, "value": {"text": "Read this.", "files": ["/etc/hostname"]}}
    call = {"fn_index": visitor.demo.functions["say_example"], "session_hash": visitor.name, "data": [None]}
    assert visitor.client.post("/gradio_api/queue/join", json={**call, "event_data": event}).status_code == 200
    [end] = [message for message in visitor.changes() if message["msg"] == "process_completed"]
    shown = end["output"]["data"]
    assert (last_words(shown), shown[CHAT][1]["content"][0]["text"]) == (
        tiny_demo.ICON_ANSWER,
        "What is in the picture?",
    )


@pytest.mark.parametrize("index", [99, -1, True, "0", None, [0, 1]])
def test_an_example_that_is_none_is_not_answered(visitor: Visitor, index: Any) -> None:
    call = {"fn_index": visitor.demo.functions["say_example"], "session_hash": visitor.name, "data": [None]}
    event = {"index": index, "value": None}
    assert visitor.client.post("/gradio_api/queue/join", json={**call, "event_data": event}).status_code == 200
    [end] = [message for message in visitor.changes() if message["msg"] == "process_completed"]
    [said] = end["output"]["data"][CHAT]
    assert "There is no such example" in said["content"][0]["text"]


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"no picture", "notes.png", "The image cannot be used: "),
        (PNG[:60], "half.png", "The image cannot be used: "),
        (PNG, "song.wav", "The audio cannot be used: "),
        (tiny_media.video(frames=5)[:300], "half.mp4", "The video cannot be used: "),
        (b"", "empty.png", "The image cannot be used: "),
    ],
    ids=["no picture", "half a picture", "a picture as sound", "half a video", "empty"],
)
def test_bad_files_get_a_sentence(visitor: Visitor, content: bytes, name: str, reason: str) -> None:
    shown = visitor.say("What is it?", visitor.attached(content, name))
    assert reason in last_words(shown)
    assert str(visitor.demo.folder) not in last_words(shown)
    assert last_words(visitor.say("What is in the picture?", visitor.attached(PNG, "good.png")))


def test_too_long_and_empty_messages_get_a_sentence(visitor: Visitor) -> None:
    assert "the model takes fewer than" in last_words(visitor.say("la " * 5000))
    assert "over 100000 characters" in last_words(visitor.say("x" * 100_001))
    assert "is empty" in last_words(visitor.say("  "))


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=FOLDER/../../etc/passwd",
        "/gradio_api/file=FOLDER/%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=FOLDER",
        "/gradio_api/file=FOLDER/%00",
        "/gradio_api/file=FOLDER/" + "a" * 5000,
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=http://127.0.0.1:1/x.png",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/stream/a/b/1/playlist-file",
        "/gradio_api/openapi.json",
        "/assets/../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/routes.py",
        "/static/..%2f..%2f..%2froutes.py",
        "/monitoring",
        "/docs",
        "/custom_component/1/a/b/c",
    ],
)
def test_nothing_but_uploads_can_be_read(demo: Demo, path: str) -> None:
    response = raw_response(demo, f"GET {path.replace('FOLDER', str(demo.folder))} HTTP/1.1\r\nConnection: close")
    assert response.split()[1] in (b"400", b"403", b"404"), response[:300]
    assert b"root:" not in response


def raw_response(demo: Demo, head: str) -> bytes:
    """What comes for a request that no client would send, until the server closes the connection."""
    host, port = demo.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}\r\nHost: x\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_an_upload_can_be_read_and_cannot_act(visitor: Visitor) -> None:
    page = b"<script>fetch('/gradio_api/upload')</script>"
    for name in ("a.html", "a.svg", "a.png"):
        [path] = visitor.upload(page, name).json()
        answer = visitor.client.get(f"/gradio_api/file={path}")
        assert answer.content == page
        assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "connect-src 'self'" in visitor.client.get("/").headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/etc/hostname", "http://127.0.0.1:1/a.png", "../../etc/hostname", 3, None, ["x"]])
def test_messages_name_uploads_only(visitor: Visitor, path: Any) -> None:
    attached = {"path": path, "url": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}
    answer = visitor.call("say", {"text": "Read it.", "files": [attached]}, False, None)
    assert (answer.status_code, "no upload" in answer.text) == (400, True)


def test_names_of_files_lead_nowhere(visitor: Visitor) -> None:
    for name in ("../../../escaped.png", "/tmp/escaped.png", "a/b.png", "..", "x" * 400 + ".png", "<img src=x>.png"):
        answer = visitor.upload(PNG, name)
        assert answer.status_code == (400 if name == ".." else 200), name
        for path in answer.json() if answer.status_code == 200 else ():
            assert Path(path).resolve().is_relative_to(visitor.demo.folder)
    assert not Path("/tmp/escaped.png").exists()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/run/predict",
        "/gradio_api/api/say",
        "/gradio_api/call/say",
        "/gradio_api/component_server",
        "/gradio_api/process_recording",
        "/gradio_api/stream/x",
        "/gradio_api/vibe-edit",
        "/gradio_api/run-history/connect",
        "/login",
        "/",
    ],
)
def test_what_the_page_does_not_use_is_not_there(visitor: Visitor, path: str) -> None:
    assert visitor.client.post(path, json={"data": []}).status_code == 404
    assert visitor.client.put(path, json={}).status_code == 405


def test_other_sites_may_not_ask(visitor: Visitor) -> None:
    files = {"files": ("a.png", PNG)}
    for origin, status in (("https://evil.example", 403), ("null", 403), (visitor.demo.address, 200)):
        answer = visitor.client.post("/gradio_api/upload", files=files, headers={"Origin": origin})
        assert answer.status_code == status, origin


def test_long_requests_are_refused_before_they_are_read(visitor: Visitor) -> None:
    before = set(visitor.demo.folder.rglob("*"))
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        while sent < 2 << 30:
            sent += 65536
            yield b"x" * 65536

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    try:
        status = visitor.client.post("/gradio_api/upload", content=endless(), headers=kind).status_code
    except httpx.TransportError:  # the server closed while we still sent
        status = 413
    assert status == 413
    assert sent < 64 << 20
    claim = f"POST /gradio_api/upload HTTP/1.1\r\nContent-Length: {2 << 30}"
    assert b" 413 " in raw_response(visitor.demo, claim)
    assert "larger than" in visitor.upload(b"x" * (UPLOAD_LIMIT + 5000), "big.png").text
    assert visitor.call("say", {"text": "x" * 2_000_000, "files": []}, False, None).status_code == 413
    assert {path for path in visitor.demo.folder.rglob("*") if path.is_file()} <= before


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b"3", b'{"data": 3}', b'{"fn_index": 99, "data": []}']
)
def test_garbage_is_refused(visitor: Visitor, body: bytes) -> None:
    assert 400 <= visitor.client.post("/gradio_api/queue/join", content=body).status_code < 500


def test_stopping_keeps_what_was_written(visitor: Visitor) -> None:
    assert visitor.call("say", {"text": tiny_demo.SONG, "files": []}, False, None).status_code == 200
    shown: list[Any] = []
    pieces = 0
    for message in visitor.changes():
        pieces += message["msg"] == "process_generating"
        if pieces == 3:
            Visitor(visitor.demo, visitor.name).call("stop")
            pieces += 1
        if message["msg"] == "process_completed" and message["output"]["data"]:
            shown = message["output"]["data"]
    assert 0 < len(last_words(shown)) < 3000
    assert last_words(shown).startswith("la")


def test_closing_the_page_ends_the_answer(visitor: Visitor) -> None:
    assert visitor.call("say", {"text": tiny_demo.SONG, "files": []}, False, None).status_code == 200
    for message in visitor.changes():
        if message["msg"] == "process_generating":
            break  # leaves the stream, as a closed page does
    [turn] = visitor.demo.server.line.turns
    assert turn.stopped.wait(20)
    assert len(turn.text) < 3000


def test_fifty_at_once_are_answered_or_told_to_come_again(demo: Demo) -> None:
    attached = Visitor(demo, "crowd").attached(medium(0), "icon.png")
    started = threading.Barrier(50)

    def one(number: int) -> str:
        started.wait()
        return last_words(Visitor(demo, f"crowd-{number}").say("What is in the picture?", attached))

    with ThreadPoolExecutor(50) as crowd:
        answers = list(crowd.map(one, range(50)))
    answered = answers.count(tiny_demo.ICON_ANSWER)
    assert answered >= USERS
    assert all(f"{USERS} people are being answered" in text for text in answers if text != tiny_demo.ICON_ANSWER)
    assert demo.server.line.turns == []
