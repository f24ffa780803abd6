"""Scores by a judge at a local stand-in of an OpenAI-compatible server, and the files that servers take."""

import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from official_files import write_files

from unimoe.errors import DataError
from unimoe.evaluation import judge
from unimoe.evaluation.judge import Endpoint, read_grade
from unimoe.evaluation.metrics.evalai_answers import normalise_answer
from unimoe.evaluation.results import score_run
from unimoe.evaluation.running.predictions import PredictionStore
from unimoe.evaluation.running.runner import PREDICTIONS, PlannedTask
from unimoe.evaluation.submissions import write_submission
from unimoe.evaluation.tasks.catalogue import TASKS
from unimoe.evaluation.tasks.item import Item


class Stub(ThreadingHTTPServer):
    """Answers with scripted (status, body) pairs, then with a grade; keeps what it was sent."""

    def __init__(self) -> None:
        self.script: list[tuple[int, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                stub.requests.append({"path": self.path, **json.loads(body)})
                stub.headers.append(dict(self.headers))
                message = {"content": "Grade: 0.5"}
                status, text = (
                    stub.script.pop(0) if stub.script else (200, json.dumps({"choices": [{"message": message}]}))
                )
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def answered(tmp_path: Path, name: str, text: str = "x is -1") -> tuple[PlannedTask, Path]:
    task = TASKS[name]
    items = task.items(write_files(tmp_path / "data", name))
    out = tmp_path / "out"
    PredictionStore(out / PREDICTIONS, name).append([{"id": i.id, "prompt": "p", "prediction": text} for i in items])
    return PlannedTask(task, items, [], set()), out


def test_a_judge_grades_each_answer_once(stub: Stub, tmp_path: Path) -> None:
    plan, out = answered(tmp_path, "mmvet")
    ask = Endpoint(stub.url, "grader", "secret-key").ask
    result = score_run([plan], out, ask)[0]
    assert (result.score, result.n, result.unit) == (50.0, 2, "percent")
    assert [request["path"] for request in stub.requests] == ["/v1/chat/completions"] * 2
    assert stub.requests[0]["model"] == "grader"
    assert stub.headers[0]["Authorization"] == "Bearer secret-key"
    prompt = stub.requests[0]["messages"][0]["content"]
    assert all(part in prompt for part in ("What is x?", "-1<AND>-5", "x is -1"))
    score_run([plan], out, ask)
    assert len(stub.requests) == 2
    for file in out.rglob("*"):
        assert not file.is_file() or b"secret-key" not in file.read_bytes()


def test_without_a_judge_there_is_no_score(tmp_path: Path) -> None:
    plan, out = answered(tmp_path, "mmvet")
    result = score_run([plan], out)[0]
    assert (result.score, result.submission, result.scored_by) == (None, "submissions/mmvet.json", "judge")
    assert json.loads((out / "submissions" / "mmvet.json").read_text()) == {"v1_0": "x is -1", "v1_1": "x is -1"}


def test_replies_without_a_grade_are_left_out(stub: Stub, tmp_path: Path) -> None:
    plan, out = answered(tmp_path, "mmvet")
    stub.script = [(200, json.dumps({"choices": [{"message": {"content": "I cannot say."}}]}))]
    result = score_run([plan], out, Endpoint(stub.url, "grader").ask)[0]
    assert (result.score, result.n, result.left_out) == (50.0, 1, 1)


def test_a_busy_judge_is_asked_again(stub: Stub) -> None:
    stub.script = [(429, ""), (503, "")]
    assert Endpoint(stub.url, "grader").ask("?") == "Grade: 0.5"
    assert len(stub.requests) == 3


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([(401, "")], "status 401"),
        ([(500, "")] * 4, "status 500"),
        ([(200, "<html>")], "sent no chat completion"),
        ([(200, '{"choices": []}')], "sent no chat completion"),
    ],
)
def test_a_judge_that_fails_is_named(stub: Stub, script: list[tuple[int, str]], message: str) -> None:
    stub.script = script
    with pytest.raises(DataError, match=message) as caught:
        Endpoint(stub.url, "grader", "secret-key").ask("?")
    assert "secret-key" not in str(caught.value)


def test_a_judge_that_is_not_there(stub: Stub) -> None:
    with pytest.raises(DataError, match="does not answer"):
        Endpoint("http://127.0.0.1:9/v1", "grader").ask("?")


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.7", 0.7),
        ("Grade: 1.0", 1.0),
        ("1", 1.0),
        ("0", 0.0),
        (" 0.35 of 1", 0.35),
        ("none", None),
        ("12", None),
        ("2.5", None),
    ],
)
def test_grades(reply: str, grade: float | None) -> None:
    assert read_grade(reply) == grade


def submitted(tmp_path: Path, name: str, form: str, missing: bool = True) -> Path:
    items = TASKS[name].items(write_files(tmp_path, name))
    texts = {item.id: "The two dogs." for item in items[: len(items) - missing]}
    return write_submission(form, items, texts, tmp_path / "submissions", name)


def test_submission_of_vqav2(tmp_path: Path) -> None:
    file = submitted(tmp_path, "vqav2", "vqav2")
    expected = [{"question_id": 1, "answer": normalise_answer("The two dogs.")}, {"question_id": 2, "answer": ""}]
    assert json.loads(file.read_text()) == expected
    assert expected[0]["answer"] == "2 dogs"


def test_submission_of_vizwiz(tmp_path: Path) -> None:
    file = submitted(tmp_path, "vizwiz", "vizwiz", missing=False)
    assert json.loads(file.read_text()) == [{"image": "V_0.jpg", "answer": "2 dogs"}]


def test_submission_of_docvqa(tmp_path: Path) -> None:
    file = submitted(tmp_path, "docvqa", "docvqa")
    assert json.loads(file.read_text()) == [
        {"questionId": 1, "answer": "The two dogs."},
        {"questionId": 2, "answer": ""},
    ]


def test_submission_of_mathvista(tmp_path: Path) -> None:
    file = submitted(tmp_path, "mathvista", "mathvista", missing=False)
    record = json.loads(file.read_text())["1"]
    assert (record["response"], record["question_type"]) == ("The two dogs.", "free_form")
    assert "image" not in record


def test_submission_of_mmbench_is_a_sheet(tmp_path: Path) -> None:
    file = submitted(tmp_path, "mmbench_en", "mmbench")
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet.iter(f"{space}row")]
    assert rows[0][:3] == ["index", "question", "hint"]
    assert rows[1][0] == "7"
    assert rows[1][-1] == "The two dogs."
    assert rows[2][2] == "A hint."
    assert rows[2][-1] == ""


def test_half_a_surrogate_pair_stops_no_file(tmp_path: Path) -> None:
    item = Item("0", "Which \ud83d?", "A", record={"index": 0, "question": "Which \ud83d?"})
    sheet = write_submission("mmbench", [item], {}, tmp_path, "mmbench")
    with zipfile.ZipFile(sheet) as archive:
        assert "Which ?" in archive.read("xl/worksheets/sheet1.xml").decode()
    file = write_submission("mathvista", [item], {}, tmp_path, "mathvista")
    assert json.loads(file.read_text(encoding="utf-8"))["0"]["question"] == item.question
