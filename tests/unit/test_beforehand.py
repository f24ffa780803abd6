"""What needs no model is refused before torch is imported, and that a model is being opened is said before."""

import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from unimoe import cli
from unimoe.model_folder import require_model

# One process for all: what a command has imported, the next would find.
SCRIPT = """
import contextlib, io, sys
from unimoe import cli
from unimoe.commands import chat
from unimoe.errors import UniMoeError

def heavy():
    return sorted({"torch", "transformers", "numpy", "PIL", "gradio"} & set(sys.modules))

def refused(*args):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(list(args))
    print(code, heavy(), said.getvalue().strip())

def opened(args, options):
    raise UniMoeError(f"with {heavy()}")

here, out = sys.argv[1], ["--out", "out"]
for model in ("nowhere/at/all", "./nowhere", "no name", here, here + "/llama"):
    refused("chat", model, "--once", "Hi")
for args in (["serve"], ["demo"], ["inspect"], ["evaluate", "--tasks", "starter", *out], ["convert", "upcycle", *out],
             ["convert", "compose", *out, "--language-model"], ["convert", "moai", *out], ["convert", "moiie", *out],
             ["convert", "assemble", "--expert", "a=b", *out, "--base"], ["convert", "layouts", "--ep", "2", *out],
             ["convert", "export-moai", *out], ["convert", "export-moiie", *out], ["convert", "export-unimoe", *out],
             ["train"], ["check-data"]):
    refused(*args, "./nowhere")
refused("chat", here, "--image", "none.png", "--once", "Hi")
refused("inspect", here, "--data", "data.jsonl")
refused("evaluate", here)
(chat.require_model, chat._open) = (lambda name: None, opened)
refused("chat", here, "--once", "Hi")
"""


def test_wrong_names_are_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    *lines, opening, opened = done.stdout.splitlines()
    assert len(lines) == 23, done.stderr[-2000:]
    assert [line for line in lines if not line.startswith("2 [] unimoe: ")] == []
    assert opening == f"2 [] Opening {tmp_path} ..."  # before a stand-in for the opening, which says what is imported
    assert opened == "unimoe: with []"
    assert ["is no folder" in line for line in lines[:5]] == [True, True, True, False, False]
    assert "no config.json" in lines[3]
    assert "'llama' model" in lines[4]
    assert ["./nowhere" in line or "nowhere has no config.json" in line for line in lines[5:20]] == [True] * 15


def test_any_model_of_transformers_may_be_evaluated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    require_model(str(tmp_path), others=True)


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_addresses_that_cannot_be_had(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for options, said in (
            (["--port", port], f"127.0.0.1:{port} cannot be listened at (Address already in use)"),
            (["--port", "65536"], "--port is 65536"),
            (["--host", "no host"], "--host is 'no host', which is no address"),
        ):
            assert cli.main([command, str(tmp_path), *options]) == 2
            assert said in capsys.readouterr().err
    # The port of a server that has ended is free; then it is the folder that cannot be used.
    assert cli.main([command, str(tmp_path), "--port", port]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_kernels_that_nobody_asked_for_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    cli._hush_imports()
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
    logger.warning("something else")
    assert caplog.messages == ["something else"]
