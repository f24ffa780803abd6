"""A Hub id is a source like a folder."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from hub_stand_in import running_hub
from transformers import LlamaConfig, LlamaForCausalLM

CONVERT = """
import sys
from unimoe import cli

assert cli.main(["convert", "upcycle", "someone/dense", "--out", "sparse"]) == 0
assert cli.main(["convert", "upcycle", "someone/absent", "--out", "absent"]) == 2
assert cli.main(["inspect", "sparse"]) == 0
"""


def test_a_model_on_the_hub_is_upcycled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 96}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path / "dense")
    with running_hub(tmp_path / "home") as hub:
        files = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
        card = b"---\nlicense: mit\n---\n"
        hub.repositories["someone/dense"] = {**files, "README.md": card, "code.py": b"raise SystemExit"}
        done = subprocess.run(
            [sys.executable, "-c", CONVERT],
            env=hub.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cannot be had from the Hub" in done.stderr
    assert not (tmp_path / "absent").exists()
    card_text = (tmp_path / "sparse" / "README.md").read_text()
    assert 'license: "mit"' in card_text
    assert 'base_model: ["someone/dense"]' in card_text
    assert not (tmp_path / "sparse" / "code.py").exists()
    receipt = json.loads((tmp_path / "sparse" / "receipt.json").read_text())
    assert receipt["source"] == "someone/dense"
