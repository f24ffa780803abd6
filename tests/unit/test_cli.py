"""The command line: quick help, clear errors."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unimoe import cli
from unimoe.errors import CheckpointError

UNIMOE = [sys.executable, "-m", "unimoe.cli"]


def unimoe(*args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*UNIMOE, *args], input=stdin, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_help_fits_one_screen() -> None:
    done = unimoe("--help", COLUMNS="80")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for command in ("quickstart", "train", "check-data", "convert", "chat", "inspect"):
        assert any(line.split()[:1] == [command] for line in lines), command


@pytest.mark.parametrize("command", ["quickstart", "train", "check-data", "convert", "chat", "inspect"])
def test_help_of_every_command(command: str) -> None:
    # In place: what a process costs is measured elsewhere.
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys\nfrom unimoe import cli\ncli.build_parser().format_help()\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    import unimoe as package

    assert unimoe("--version").stdout.strip() == f"unimoe {package.__version__}"


def test_the_module_runs_from_any_folder(tmp_path: Path) -> None:
    for place in (tmp_path, Path(cli.__file__).parent):
        done = subprocess.run([*UNIMOE, "--version"], cwd=place, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), place


def test_unknown_command_names_the_known_ones() -> None:
    done = unimoe("quickstrat")
    assert done.returncode == 2
    assert "quickstart" in done.stderr
    assert "Traceback" not in done.stderr


class Failing:
    """A command module in place of the real ones."""

    def __init__(self, error: BaseException | None, code: int | None = None) -> None:
        self.error, self.code = error, code

    def add_parser(self, subparsers: Any) -> None:
        subparsers.add_parser("work", help="fails").add_argument("--times", type=int)

    def run(self, args: argparse.Namespace) -> int | None:
        if self.error is not None:
            raise self.error
        return self.code


def run_failing(monkeypatch: pytest.MonkeyPatch, command: Failing, *args: str) -> int:
    monkeypatch.setattr(cli, "_command_names", lambda: ["work"])
    monkeypatch.setattr(cli, "import_module", lambda name: command)
    return cli.main(["work", *args])


def test_own_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = CheckpointError("model/ has no\nweights: train it.")
    assert run_failing(monkeypatch, Failing(error)) == 2
    assert capsys.readouterr().err == "unimoe: model/ has no weights: train it.\n"


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.setattr(cli, "_command_names", lambda: ["work"])
    monkeypatch.setattr(cli, "import_module", lambda name: Failing(CheckpointError("no weights")))
    assert cli.main(["--debug", "work"] if place == "before" else ["work", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        run_failing(monkeypatch, Failing(KeyError("bug")))


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_failing(monkeypatch, Failing(KeyboardInterrupt())) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_exit_codes_of_commands_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_failing(monkeypatch, Failing(None, 3)) == 3
    assert run_failing(monkeypatch, Failing(None)) == 0


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`unimoe ... | head -1`"""
    script = (
        "import sys\nfrom unimoe import cli\n"
        "class Talk:\n"
        "    def add_parser(self, s): s.add_parser('work')\n"
        "    def run(self, a):\n"
        "        for _ in range(100000): print('word ' * 20)\n"
        "cli._command_names = lambda: ['work']\ncli.import_module = lambda name: Talk()\nsys.exit(cli.main(['work']))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline().startswith("word")
    writer.stdout.close()
    assert writer.wait(timeout=60) == 0
    assert writer.stderr.read() == ""
    writer.stderr.close()
