"""Saved folders do the same with unimoe installed and as remote code in a process that cannot import it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_checks
import pytest
import tiny_moai
import tiny_training
import torch
import twins

from unimoe import UniMoeForCausalLM, UniMoeProcessor
from unimoe.conversion.publishing.hub import PROCESSOR_AUTO_MAP, code_files, save_bundle
from unimoe.modeling_unimoe.configuration_unimoe import AUTO_MAP

MODELS = ("everything", "moiie", "text-only", "shared-tower", "mixed", "saved")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle per twin and the inputs to try it on; "everything" (BEATs, Q-Former, Whisper) has a processor too.

    "saved" is what `save_pretrained` makes of "everything".
    """
    root = tmp_path_factory.mktemp("bundles")
    processor = tiny_training.processor()
    model = tiny_training.model(processor, sparse=True)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [i for i in model.config.placeholder_ids.values() if i is not None]
    save_bundle(model, processor, root / "everything")
    messages = hub_checks.chat(
        {"type": "image", "image": hub_checks.picture()}, {"type": "audio", "audio": hub_checks.clip()}
    )
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    torch.save(dict(inputs), root / "everything.inputs")
    UniMoeForCausalLM.from_pretrained(root / "everything").save_pretrained(root / "saved")
    UniMoeProcessor.from_pretrained(root / "everything").save_pretrained(root / "saved")
    torch.save(dict(inputs), root / "saved.inputs")
    save_bundle(tiny_moai.model(), None, root / "mixed")
    torch.save(tiny_moai.collate([tiny_moai.sample(1), tiny_moai.sample(2, aux_tokens=9)]), root / "mixed.inputs")
    for name in MODELS[1:-2]:
        save_bundle(twins.build(name), None, root / name)
        torch.save(twins.collate(twins.samples(name)), root / f"{name}.inputs")
    return root


@pytest.fixture(scope="module")
def remote(folders: Path) -> dict[str, Any]:
    """What a fresh process without unimoe saw."""
    home, out = folders / "home", folders / "seen"
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    environment = kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, hub_checks.__file__, folders, out]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert set(one) == set(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    else:
        assert one == other


@pytest.mark.parametrize("name", MODELS)
def test_every_auto_class_gives_the_same_installed_and_remote(
    name: str, folders: Path, remote: dict[str, Any]
) -> None:
    installed = hub_checks.check_folder(folders / name)
    assert_equal(remote[name], installed)
    logits = installed["AutoModelForCausalLM"]["output"]
    for implementation in hub_checks.EXPERTS:
        assert installed[implementation]["experts"] == {implementation}
        torch.testing.assert_close(installed[implementation]["output"], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_grouped_mm_really_runs_for_every_class(name: str, remote: dict[str, Any]) -> None:
    for auto_class in hub_checks.AUTO_CLASSES:
        seen = remote[name][auto_class]
        assert seen["experts"] == {"grouped_mm"}
        assert seen["class"] == ("UniMoeModel" if auto_class == "AutoModel" else "UniMoeForCausalLM")


def test_the_fresh_process_had_no_unimoe(remote: dict[str, Any]) -> None:
    assert remote["modules"] == []


def test_processor_gives_the_same_installed_and_remote(folders: Path, remote: dict[str, Any]) -> None:
    assert_equal(remote["processor"], hub_checks.check_processor(folders / "everything"))


def test_save_pretrained_leaves_a_folder_that_loads_elsewhere(folders: Path, remote: dict[str, Any]) -> None:
    assert_equal(remote["saved processor"], remote["processor"])
    written = folders / "saved"
    assert {path.name for path in written.iterdir()} >= {path.name for path in code_files()}
    assert json.loads((written / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert json.loads((written / "processor_config.json").read_text())["auto_map"] == PROCESSOR_AUTO_MAP


def test_a_subclass_is_saved_without_code_that_is_not_its_own(folders: Path, tmp_path: Path) -> None:
    class Mine(UniMoeForCausalLM):
        pass

    Mine.from_pretrained(folders / "text-only").save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_pipelines_answer_alike_installed_and_remote(folders: Path, remote: dict[str, Any]) -> None:
    installed = hub_checks.check_pipelines(folders / "everything")
    assert installed == remote["pipelines"]
    if "any-to-any audio" in installed:
        assert installed["any-to-any audio"] != installed["any-to-any image"]


def test_saving_again_keeps_the_folder_whole(folders: Path, remote: dict[str, Any], tmp_path: Path) -> None:
    first = remote["everything"]["AutoModelForCausalLM"]["output"]
    assert torch.equal(remote["again"]["output"], first)
    assert_equal(remote["again"]["processor"], remote["processor"])
    assert set(remote["again"]["files"]) >= {path.name for path in code_files()}
    installed = hub_checks.check_saved_again(folders / "everything", tmp_path / "again")
    torch.testing.assert_close(installed["output"], first, rtol=0, atol=1e-6)


def test_card_and_auto_map_name_what_is_there(folders: Path) -> None:
    card = (folders / "everything" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\npipeline_tag: "any-to-any"\n')
    assert "4 experts, 2 per token, in 2 of 3 layers" in card
    for file, key in (("config.json", "AutoModelForMultimodalLM"), ("processor_config.json", "AutoProcessor")):
        auto_map = json.loads((folders / "everything" / file).read_text())["auto_map"]
        assert key in auto_map
        for reference in auto_map.values():
            module, name = reference.split(".")
            assert f"class {name}" in (folders / "everything" / f"{module}.py").read_text()


def test_a_bundle_takes_the_place_of_an_older_one(folders: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "left_over").write_text("x")
    save_bundle(twins.build("text-only"), None, target, card="# Mine\n")
    assert (target / "README.md").read_text() == "# Mine\n"
    assert not (target / "left_over").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
