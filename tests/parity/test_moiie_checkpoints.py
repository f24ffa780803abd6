"""MoIIE's checkpoints through the converter: folders as the original saves them, answers as it gives them, and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import GoldenCase
from moiie_case import is_moiie, moiie_batch, moiie_variant
from safetensors.torch import load_file, save_file
from tiny_tokenizer import save_word_tokenizer

from unimoe import UniMoeForCausalLM
from unimoe.conversion.released.export_moiie import export_moiie
from unimoe.conversion.released.import_moiie import import_moiie
from unimoe.conversion.released.import_receipt import ImportReceipt

PREPROCESSOR = "preprocessor_config.json"
checkpoint = pytest.mark.golden(
    "*.in.input_ids", "*.out.total_loss", weights=("lm_head*", "model.mm_projector*"), where=is_moiie
)


@checkpoint
def test_a_moiie_checkpoint_answers_as_the_original(golden_case: GoldenCase, tmp_path: Path) -> None:
    model, receipt = converted(golden_case, tmp_path)
    assert receipt.variant == moiie_variant(golden_case).name
    for name in golden_case.names("*.out.total_loss"):
        batch = moiie_batch(golden_case, name.split(".")[0], model)
        if len(set(batch.lengths)) == 1:  # elsewhere the original puts zeros where a padding token is here
            with torch.no_grad():
                output = model(**batch.inputs, labels=batch.labels)
            golden_case.check(name, output.loss[None])
            golden_case.check_if_present(name.replace("total_loss", "logits"), output.logits)


@checkpoint
def test_the_receipt_of_a_moiie_checkpoint_holds_every_tensor(golden_case: GoldenCase, tmp_path: Path) -> None:
    model, receipt = converted(golden_case, tmp_path)
    records = receipt.sources["checkpoint/model.safetensors"]
    assert set(records) == set(golden_case.weights)
    assert {name for name, record in records.items() if record.fate == "dropped"} == unreached(golden_case)
    records = {name: record for name, record in records.items() if name not in unreached(golden_case)}
    assert {record.fate for record in records.values()} == {"consumed"}
    consumed = {ours for record in records.values() for ours in record.note.split(", ")}
    made = {name for name, record in receipt.targets.items() if not record.made_of}
    assert consumed | made == set(model.state_dict()) == set(receipt.targets)
    assert all(name.endswith(".gate.weight") for name in made)
    assert bool(made) == (moiie_variant(golden_case).kind == "modality")
    assert json.loads((tmp_path / "out" / "receipt.json").read_text()) == receipt.to_dict()
    golden_case.comparisons += 1  # of names, not tensors


@checkpoint
def test_a_moiie_checkpoint_survives_the_way_there_and_back(golden_case: GoldenCase, tmp_path: Path) -> None:
    converted(golden_case, tmp_path)
    export_moiie(tmp_path / "out", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert set(again) == set(golden_case.weights)
    for name, tensor in golden_case.weights.items():
        assert torch.equal(again[name], 0 * tensor if name in unreached(golden_case) else tensor), name
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    for field, value in written.items():
        if field in golden_case.config and field not in ("mm_vision_tower", "router_jitter_noise"):
            assert value == pytest.approx(golden_case.config[field]), field
    import_moiie(str(tmp_path / "back"), tmp_path / "twice")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "twice"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "twice")]
    assert configs[0] == configs[1]
    golden_case.comparisons += len(again)


@checkpoint
def test_pictures_are_prepared_as_the_towers_settings_say(golden_case: GoldenCase, tmp_path: Path) -> None:
    if not (golden_case.path / PREPROCESSOR).is_file():
        pytest.skip(f"the case has no {PREPROCESSOR}")
    save_word_tokenizer(tmp_path / "checkpoint")
    converted(golden_case, tmp_path)
    export_moiie(tmp_path / "out", tmp_path / "back")
    expected = golden_case.json("preprocessor_config")
    ours = json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"]
    given_back = json.loads((tmp_path / "back" / "siglip" / "preprocessor_config.json").read_text())
    for field in set(expected) - {
        "_valid_processor_keys",
        "image_processor_type",
    }:  # names of one version of transformers
        assert ours[field] == given_back[field] == pytest.approx(expected[field]), field
        golden_case.comparisons += 1


def unreached(case: GoldenCase) -> set[str]:
    """Tensors of experts that no router of the original has a row for."""
    pools = moiie_variant(case).pools
    numbers = () if pools is None else pools.unreached
    return {name for name in case.weights for number in numbers if f".mlp.experts.{number}." in name}


def converted(case: GoldenCase, root: Path) -> tuple[UniMoeForCausalLM, ImportReceipt]:
    """The written model, loaded as users load it."""
    for folder in ("checkpoint", "siglip"):
        (root / folder).mkdir(exist_ok=True)
    save_file(case.weights, root / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(case.path / "config.json", root / "checkpoint" / "config.json")
    shutil.copyfile(case.path / "vision_config.json", root / "siglip" / "config.json")
    if (case.path / PREPROCESSOR).is_file():
        shutil.copyfile(case.path / PREPROCESSOR, root / "siglip" / PREPROCESSOR)
    receipt = import_moiie(str(root / "checkpoint"), root / "out", vision_tower=str(root / "siglip"))
    model, info = UniMoeForCausalLM.from_pretrained(root / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), receipt
