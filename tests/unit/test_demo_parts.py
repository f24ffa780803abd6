"""Parts of the demo by themselves: its password, its folder of uploads, its line, its command."""

import asyncio
import hmac
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unimoe.cli import main
from unimoe.commands import demo as command
from unimoe.demo.answer_line import AnswerLine
from unimoe.demo.conversation import kind_of, question, shown
from unimoe.demo.uploads import UploadFolder
from unimoe.errors import RequestError

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
from unimoe.demo import login  # noqa: E402

PASSWORD = "correct horse"


async def page(scope: Any, receive: Any, send: Any) -> None:
    """Stands for what the password guards."""
    await login.respond(send, 200, "the page")


def asked(guarded: Any, *requests: Callable[[Any], Any]) -> list[Any]:
    """The responses to requests of one browser."""

    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://demo") as browser:
            return [await request(browser) for request in requests]

    return asyncio.run(ask())


def give(password: str) -> Callable[[Any], Any]:
    return lambda browser: browser.post("/login", data={"password": password})


def test_the_password_opens_the_page() -> None:
    responses = asked(login.Login(page, PASSWORD), give(PASSWORD), lambda browser: browser.get("/config"))
    assert [response.status_code for response in responses] == [303, 200]
    assert {"httponly", "samesite=lax"} <= set(responses[0].headers["set-cookie"].lower().split("; "))
    assert responses[1].text == "the page"


@pytest.mark.parametrize(
    "path", ["/", "/config", "/gradio_api/file=/etc/passwd", "/gradio_api/queue/data", "/assets/a.js"]
)
def test_nothing_is_sent_without_the_password(path: str) -> None:
    forged = {"cookie": "unimoe_demo=guess; unimoe_demo"}
    for headers in ({}, forged):
        [response] = asked(login.Login(page, PASSWORD), lambda browser, sent=headers: browser.get(path, headers=sent))
        assert "the page" not in response.text
        assert response.status_code == (200 if path == "/" else 401)
    [response] = asked(login.Login(page, PASSWORD), lambda browser: browser.post(path, content=b"x"))
    assert response.status_code != 200 or "the page" not in response.text


@pytest.mark.parametrize("wrong", ["", "correct", PASSWORD + "x", PASSWORD.upper(), "ü", "\0"])
def test_other_passwords_do_not_open_it(wrong: str) -> None:
    responses = asked(
        login.Login(page, PASSWORD),
        give(wrong),
        lambda browser: browser.get("/config"),
        lambda browser: browser.get("/login"),
    )
    assert [response.status_code for response in responses] == [403, 401, 200]
    assert "the page" not in responses[2].text  # the form again


def test_garbage_is_no_password() -> None:
    for body in (b"", b"\xff" * 100, b"&" * 4000, b"password=" + b"x" * 1_000_000):
        [response] = asked(
            login.Login(page, PASSWORD), lambda browser, sent=body: browser.post("/login", content=sent)
        )
        assert response.status_code == 403


def test_guessing_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(login.time, "monotonic", lambda: now)
    guarded = login.Login(page, PASSWORD)
    statuses = [response.status_code for response in asked(guarded, *[give("guess")] * 12, give(PASSWORD))]
    assert statuses == [403] * 10 + [429] * 3, "the right one waits too, or it would tell"
    now = 61.0
    assert asked(guarded, give(PASSWORD))[0].status_code == 303


def test_many_guesses_at_once_are_counted_each() -> None:
    guarded = login.Login(page, PASSWORD)

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://demo") as browser:
            responses = await asyncio.gather(*(give(f"guess {n}")(browser) for n in range(30)))
            return [response.status_code for response in responses]

    assert sorted(asyncio.run(crowd())) == [403] * 10 + [429] * 20


def test_passwords_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def note(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return original(one, other)

    monkeypatch.setattr(login.hmac, "compare_digest", note)
    asked(login.Login(page, PASSWORD), give("x"), give("x" * 1000))
    assert compared == [(32, 32), (32, 32)]


def test_old_uploads_make_room_and_examples_stay(tmp_path: Path) -> None:
    def put(name: str, size: int, age: int) -> Path:
        file = tmp_path / name / "file"
        file.parent.mkdir()
        file.write_bytes(b"x" * size)
        os.utime(file, (1000 - age, 1000 - age))
        return file

    example = put("example", 100_000, 9)
    folder = UploadFolder(tmp_path, most_bytes=400_000)
    folder.keep_what_is_there()
    old, middle, new = put("old", 150_000, 3), put("middle", 150_000, 2), put("new", 100_000, 1)
    folder.make_room(0)
    assert old.exists()
    folder.make_room(100_000)
    assert [file.exists() for file in (example, old, middle, new)] == [True, False, True, True]
    for number in range(7):
        put(f"small{number}", 1, 0)
    folder.make_room(0)
    assert not middle.exists(), "many small ones count too"


def test_a_folder_holds_its_files_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "uploads", tmp_path / "secret"
    folder.mkdir()
    outside.write_text("secret")
    inside = folder / "a.png"
    inside.write_text("x")
    (folder / "link").symlink_to(outside)
    uploads = UploadFolder(folder, 1)
    assert uploads.holds(str(inside))
    others = [folder, folder / "link", folder / ".." / "secret", outside, folder / "none", "a.png", "", f"{inside}\0"]
    assert not any(uploads.holds(str(path)) for path in others)


class Failing:
    """Stands for a model that runs out of memory."""

    options = {"max_new_tokens": 5}
    model = processor = None

    def needs(self, *_: Any) -> Any:
        raise MemoryError("no room")


def test_a_failure_gets_a_sentence_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing: Any = Failing()
    line = AnswerLine(failing, longest=2)

    async def ask() -> str:
        turn = line.ask([])
        with pytest.raises(RequestError) as caught:
            async for _ in turn.progress():
                pass
        return str(caught.value)

    sentences = [asyncio.run(ask()), asyncio.run(ask())]
    assert sentences[0] == sentences[1]
    assert "MemoryError" in sentences[0]
    assert line.turns == []


def test_whoever_asks_a_stopping_server_is_told_so() -> None:
    failing: Any = Failing()
    line = AnswerLine(failing, longest=2)
    line.stop()
    with pytest.raises(RequestError, match="The server is stopping"):
        line.ask([])


def test_whoever_leaves_while_waiting_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    failing: Any = Failing()
    line = AnswerLine(failing, longest=3)
    begun, go_on = threading.Event(), threading.Event()
    answered: list[Any] = []

    def slowly(turn: Any, messages: list[Any]) -> None:
        answered.append(messages)
        begun.set()
        go_on.wait(20)

    monkeypatch.setattr(line, "_answer", slowly)

    async def three() -> None:
        first, second, third = (line.ask([number]) for number in range(3))
        assert [turn.ahead for turn in (first, second, third)] == [0, 1, 2]
        with pytest.raises(RequestError, match="3 people are being answered"):
            line.ask([3])
        await asyncio.to_thread(begun.wait, 20)
        second.stop()
        await asyncio.sleep(0)
        go_on.set()
        for turn in (first, second, third):
            async for _ in turn.progress():
                pass
        assert second.reply is None

    asyncio.run(three())
    assert answered == [[0], [2]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.PNG", "image"),
        ("b.webm", "video"),
        ("c.flac", "audio"),
        ("d.mkv", "video"),
        ("f.ogg", "audio"),
        ("e.py", None),
        ("png", None),
    ],
)
def test_kinds_of_files(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_what_a_model_does_not_take_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'a\.mp4' cannot be used here: this model takes image"):
        question("What?", ["/tmp/a.mp4"], ["image"])
    heard = question("What?", ["/tmp/a.mp4"], ["video", "audio"], hear_videos=True)
    assert heard["content"][0] == {"type": "video", "path": "/tmp/a.mp4"}  # with its sound track, if it has one
    silent = question("What?", ["/tmp/a.mp4"], ["video", "audio"])
    assert silent["content"][0] == {"type": "video", "path": "/tmp/a.mp4", "sound_track": False}
    [_, bubble] = shown([question("<b>", ["/tmp/a.png"], ["image"])])
    assert bubble["content"] == "&lt;b&gt;"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "0"], "--port is 0"),
        (["--root-path", "demo/"], "--root-path is 'demo/'"),
        (["--password-file", "none.txt"], "cannot be read"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        ([], "UNIMOE_DEMO_PASSWORD is an empty password"),
    ],
)
def test_options_that_cannot_work(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIMOE_DEMO_PASSWORD", "")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert main(["demo", "nowhere", "--port", port, *options]) == 2
    assert reason in capsys.readouterr().err


def test_a_model_may_be_shown_in_few_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, device: Any, options: Any, quantize: str | None) -> Any:
        raise RequestError(f"{name} in {quantize}")

    monkeypatch.setattr("unimoe.demo.server.load_answerer", load)
    (tmp_path / "config.json").write_text('{"model_type": "unimoe"}')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert main(["demo", str(tmp_path), "--port", port, "--quantize", "int4"]) == 2
    assert f"{tmp_path} in int4" in capsys.readouterr().err


def test_a_missing_gradio_names_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimoe.commands._beforehand.find_spec", lambda name: None)
    assert main(["demo", "nowhere"]) == 2
    assert "pip install 'unimoe[demo]'" in capsys.readouterr().err


def test_where_a_password_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "password.txt"
    file.write_bytes(b"from the file\r\nmore\n")
    monkeypatch.setenv("UNIMOE_DEMO_PASSWORD", "from the environment")
    monkeypatch.setattr("getpass.getpass", lambda prompt: "from the prompt")
    for options, expected in (
        ({"password": True, "password_file": None}, "from the prompt"),
        ({"password": False, "password_file": file}, "from the file"),
        ({"password": False, "password_file": None}, "from the environment"),
    ):
        assert command.given_password(type("Arguments", (), options)) == expected
