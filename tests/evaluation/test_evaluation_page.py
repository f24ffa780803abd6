"""docs/evaluation.md: its commands are accepted, its Python runs, its table is the catalogue."""

import re
import shlex
from pathlib import Path

import pytest

from unimoe import cli
from unimoe.evaluation.tasks.catalogue import TASKS, find_tasks

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.startswith("unimoe ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    args = cli.build_parser().parse_args(shlex.split(command)[1:])
    if args.tasks:
        assert find_tasks(args.tasks.split(","))


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(code, {})
    assert capsys.readouterr().out


def test_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    expected = [(t.name, t.modality, t.scored_by, t.extraction) for t in TASKS.values()]
    assert rows == expected
