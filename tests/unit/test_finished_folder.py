"""Folders that are complete or not there, whatever happens to the process that writes them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unimoe.conversion.checkpoints.finished_folder import finished_folder
from unimoe.errors import ConversionError

# Begins a folder, says so, and waits to be killed.
BEGIN = """
import sys
from pathlib import Path
from unimoe.conversion.checkpoints.finished_folder import finished_folder
with finished_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print(flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_fills_up_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    with pytest.raises(ConversionError, match="is not any more"), finished_folder(out):
        (tmp_path / "mine").rename(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_what_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot be written"), finished_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(ConversionError, match="No space left"), finished_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out-backup_1").mkdir()  # somebody else's
    with subprocess.Popen(
        [sys.executable, "-c", BEGIN, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with finished_folder(tmp_path / "out2"):
            pass
        with pytest.raises(KeyError), finished_folder(out):
            raise KeyError
        assert len(list(tmp_path.glob(".out-*"))) == 2, "the folder of a living process was removed"
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob(".out-*"))) == 2
    with finished_folder(out) as folder:
        (folder / "whole").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-backup_1", "out", "out2"]
    assert os.listdir(out) == ["whole"]


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out-abcd1234"
    (work / "old").mkdir(parents=True)
    (work / "old" / "precious").touch()
    (work / ".unimoe-work").touch()
    with pytest.raises(ConversionError, match="is not empty"), finished_folder(out):
        pass
    assert os.listdir(out) == ["precious"]
    assert os.listdir(tmp_path) == ["out"]


COMMAND = f"""
import argparse, signal
from unimoe import cli

# Under nohup, which tests may run under, a process starts with this signal ignored, and the command leaves it so.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def run(args):
    exec({BEGIN!r})

class Parser:
    parse_args = staticmethod(lambda argv: argparse.Namespace(run=run, debug=False))

cli.build_parser = Parser
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_command_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(os.listdir(tmp_path)) == 1
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    assert os.listdir(tmp_path) == []
