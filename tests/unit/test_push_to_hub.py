"""`push_to_hub` sends a repository that loads by its id where unimoe is not installed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_checks
import pytest
import torch
from hub_stand_in import HubStandIn, running_hub
from safetensors.torch import load as load_safetensors

from unimoe.conversion.publishing.hub import code_files

TESTS = Path(hub_checks.__file__).parent
PUSH = """
import sys
sys.path.insert(0, sys.argv[1])
import hub_checks, tiny_training, torch

processor = tiny_training.processor()
model = tiny_training.model(processor, sparse=True)
url = model.push_to_hub("someone/tiny", commit_message="Add the model")
processor.push_to_hub("someone/tiny")
again = type(model)._auto_class, type(processor)._auto_class
messages = hub_checks.chat({"type": "image", "image": hub_checks.picture()})
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    torch.save({"logits": model(**inputs).logits, "auto": again, "url": str(url)}, sys.argv[2])
"""
LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import hub_checks, torch
sys.meta_path.insert(0, hub_checks.HideUnimoe())
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("someone/tiny", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("someone/tiny", trust_remote_code=True)
messages = hub_checks.chat({"type": "image", "image": hub_checks.picture()})
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    torch.save({"logits": model(**inputs).logits}, sys.argv[2])
model.push_to_hub("other/copy")
processor.push_to_hub("other/copy")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubStandIn, Path]]:
    """A Hub on which one process, with unimoe, has pushed and another, without it, has loaded and pushed again."""
    root = tmp_path_factory.mktemp("hub")
    with running_hub(root / "home") as stand_in:
        for name, code in (("pushed", PUSH), ("loaded", LOAD)):
            command = [sys.executable, "-c", code, TESTS, root / name]
            done = subprocess.run(
                command, env=stand_in.environment, cwd=root, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
        yield stand_in, root


def test_all_files_arrive(hub: tuple[HubStandIn, Path]) -> None:
    stand_in, _ = hub
    files = stand_in.repositories["someone/tiny"]
    assert set(files) >= {path.name for path in code_files()}
    assert set(files) >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert set(files) >= {"processor_config.json", "tokenizer.json", "chat_template.jinja"}
    for path in code_files():
        assert files[path.name] == path.read_bytes()
    assert "AutoModelForMultimodalLM" in json.loads(files["config.json"])["auto_map"]
    assert stand_in.unknown_requests in ([], ["GET /api/agent-harnesses"])


def test_weights_went_through_large_file_storage(hub: tuple[HubStandIn, Path]) -> None:
    stand_in, _ = hub
    weights = stand_in.repositories["someone/tiny"]["model.safetensors"]
    assert list(stand_in.lfs_objects.values()) == [weights]
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in load_safetensors(weights)


def test_repository_loads_by_its_id_without_unimoe(hub: tuple[HubStandIn, Path]) -> None:
    _, root = hub
    torch.testing.assert_close(
        torch.load(root / "loaded")["logits"], torch.load(root / "pushed")["logits"], rtol=0, atol=1e-6
    )


def test_a_remote_model_can_be_pushed_on(hub: tuple[HubStandIn, Path]) -> None:
    stand_in, _ = hub
    first, second = stand_in.repositories["someone/tiny"], stand_in.repositories["other/copy"]
    assert set(second) == set(first)
    assert second["model.safetensors"] == first["model.safetensors"]
    assert all(second[path.name] == first[path.name] for path in code_files())


def test_pushing_leaves_later_saves_as_they_were(hub: tuple[HubStandIn, Path]) -> None:
    _, root = hub
    pushed = torch.load(root / "pushed")
    assert pushed["auto"] == (None, None)
    assert "someone/tiny" in pushed["url"]
