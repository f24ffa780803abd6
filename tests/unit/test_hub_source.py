"""A Hub id is a source like a folder, and a result can go to the Hub."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_llama
import tiny_parts
import torch
from hub_stand_in import running_hub

from unimoe.conversion.dense.sources import open_source

CONVERT = """
import sys
from unimoe import cli

assert cli.main(["convert", "upcycle", "someone/dense", "--out", "sparse"]) == 0
assert cli.main(["convert", "upcycle", "someone/absent", "--out", "absent"]) == 2
assert cli.main(["inspect", "sparse"]) == 0
"""


def run_python(code: str, hub: Any, folder: Path) -> str:
    """What a new process says on stderr that knows this Hub."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=hub.environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_a_model_on_the_hub_is_upcycled(tmp_path: Path) -> None:
    tiny_llama.llama(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    with running_hub(tmp_path / "home") as hub:
        files = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
        card = b"---\nlicense: mit\n---\n"
        hub.repositories["someone/dense"] = {**files, "README.md": card, "code.py": b"raise SystemExit"}
        said = run_python(CONVERT, hub, tmp_path)
    assert "cannot be had from the Hub" in said
    assert not (tmp_path / "absent").exists()
    card_text = (tmp_path / "sparse" / "README.md").read_text()
    assert 'license: "mit"' in card_text
    assert 'base_model: ["someone/dense"]' in card_text
    assert not (tmp_path / "sparse" / "code.py").exists()
    receipt = json.loads((tmp_path / "sparse" / "receipt.json").read_text())
    assert receipt["source"] == "someone/dense"


PUSH = """
import sys
from unimoe import cli

options = ["--out", "sparse", "--groups", "moiie", "--drop-ratio", "0.25", "--allow-gap", "inf"]
assert cli.main(["convert", "upcycle", "dense", *options, "--push-to-hub", "me/sparse"]) == 0
assert cli.main(["convert", "upcycle", "dense", "--out", "other", "--push-to-hub", "no such name"]) == 2
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("me/sparse", trust_remote_code=True)
assert model.config.text_config.num_experts == 4
"""


def test_a_result_goes_to_the_hub_with_recipe_receipt_and_licence(tmp_path: Path) -> None:
    tiny_llama.llama(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    card = "---\nlicense: other\nlicense_name: of-the-house\nlicense_link: LICENSE.md\n---\n# Dense\n"
    (tmp_path / "dense" / "README.md").write_text(card)
    (tmp_path / "dense" / "LICENSE.md").write_text("Ask first.\n")
    with running_hub(tmp_path / "home") as hub:
        for code in (PUSH, LOAD):
            run_python(code, hub, tmp_path)
        files = hub.repositories["me/sparse"]
    assert set(files) >= {"model.safetensors", "config.json", "receipt.json", "README.md", "LICENSE.md"}
    assert files["LICENSE.md"] == b"Ask first.\n"
    written = files["README.md"].decode()
    for words in (
        'license: "other"\nlicense_name: "of-the-house"\nlicense_link: "LICENSE.md"',
        "Upcycled from `dense`: the FFNs of layers 1 became experts.",
        "- drop: 0.25 of every expert's width starts anew (arXiv 2502.19261)",
        "| **all** |",
        "max |Δlogit|",
    ):
        assert words in written
    assert str(tmp_path) not in written + files["receipt.json"].decode()
    assert (tmp_path / "other" / "config.json").is_file()  # an upload that fails leaves the folder


@pytest.mark.parametrize(
    ("card", "files", "expected"),
    [
        ("---\nlicense: mit\n---\n", [], {"license": "mit"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", [], {}),
        ("# No metadata\n", ["LICENSE"], {"license": "other", "license_link": "LICENSE"}),
        ("---\nlicense: [\n---\n", [], {}),
    ],
)
def test_licences_are_carried_over(card: str, files: list[str], expected: dict[str, str], tmp_path: Path) -> None:
    tiny.model({"num_experts": 0, "sparse_layers": None}).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(card)
    for name in files:
        (tmp_path / name).write_text("...")
    assert open_source(str(tmp_path)).license_metadata == expected


COMPOSE = """
from unimoe import cli

command = ["convert", "compose", "--language-model", "someone/dense", "--vision-tower", "someone/tower"]
assert cli.main([*command, "--out", "composed"]) == 0
"""


def test_parts_come_from_the_hub_pickled_ones_too(tmp_path: Path) -> None:
    tiny_parts.language_model(tmp_path / "dense")
    tower = tiny_parts.vision_tower("siglip", tmp_path / "tower")
    (tmp_path / "tower" / "model.safetensors").unlink()
    torch.save(tower.state_dict(), tmp_path / "tower" / "pytorch_model.bin")
    work = tmp_path / "work"
    work.mkdir()
    with running_hub(tmp_path / "home") as hub:
        for name in ("dense", "tower"):
            hub.repositories[f"someone/{name}"] = {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        done = subprocess.run(
            [sys.executable, "-c", COMPOSE], env=hub.environment, cwd=work, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-2000:]
    card = (tmp_path / "work" / "composed" / "README.md").read_text()
    assert 'base_model: ["someone/dense", "someone/tower"]' in card
    assert "[someone/tower](https://huggingface.co/someone/tower)" in card
