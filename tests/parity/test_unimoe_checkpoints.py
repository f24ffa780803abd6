"""Uni-MoE's checkpoint folders through the converter: merged weights, logits, adapter, receipt."""

import json
import re
from pathlib import Path

import pytest
import torch
from golden import (
    GoldenCase,
    GoldenMismatchError,
    changeable_copy,
    compare,
    discover,
    leave_for_lack_of_data,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from unimoe_case import merge_pairs, original_batch

from unimoe import UniMoeForCausalLM
from unimoe.conversion.checkpoints.checkpoint_reader import Checkpoint, TensorFile
from unimoe.conversion.checkpoints.key_rules import KeyMap
from unimoe.conversion.checkpoints.llava_keys import vision_prefix
from unimoe.conversion.dense.beats_file import BeatsFile
from unimoe.conversion.released.import_receipt import ImportReceipt
from unimoe.conversion.released.import_unimoe import UniMoeFolders, plan_import, run_import
from unimoe.conversion.released.unimoe_experts import EXPERT_FILES
from unimoe.conversion.released.unimoe_keys import rules_for
from unimoe.conversion.released.unimoe_variant import layout_of

CHECKPOINT = ("input_ids", "images", "image_mask", "input_features", "features_mask")


def is_checkpoint(case: GoldenCase) -> bool:
    """Folders in the released layout."""
    return all((case.path / folder / "config.json").is_file() for folder in ("base", "e2", "clip"))


def has_expert_files(case: GoldenCase) -> bool:
    """The 8-expert variant, whose base model lacks the experts and the routers."""
    return is_checkpoint(case) and (case.path / "experts").is_dir()


def has_merged_weights(case: GoldenCase) -> bool:
    return is_checkpoint(case) and bool(case.names("*", "merged_weights"))


checkpoint = pytest.mark.golden(*CHECKPOINT, "logits_*", where=is_checkpoint)
with_lora = pytest.mark.parametrize("keep_lora", [False, True], ids=["merged", "adapter"])


@checkpoint
@with_lora
def test_the_fine_tuned_model_answers_as_the_original(
    golden_case: GoldenCase, tmp_path: Path, keep_lora: bool
) -> None:
    model, _ = converted(golden_case, tmp_path / "out", keep_lora=keep_lora)
    check_logits(golden_case, model, "logits_merged")


@pytest.mark.golden(*CHECKPOINT, "logits_base", where=is_checkpoint)
def test_the_base_model_answers_as_the_original(golden_case: GoldenCase, tmp_path: Path) -> None:
    model, _ = converted(golden_case, tmp_path / "out", finetuned=False)
    check_logits(golden_case, model, "logits_base")


@checkpoint
def test_what_the_original_loses_is_the_lora_of_the_routers(golden_case: GoldenCase, tmp_path: Path) -> None:
    model, _ = converted(golden_case, tmp_path / "out")
    gates = golden_case.path / "e2" / "mlp_gates.bin"
    lora = {name: TensorFile(gates).read(name) for name in TensorFile(gates).tensors}
    scale = json.loads((golden_case.path / "e2" / "adapter_config.json").read_text())
    for name in [name for name in lora if ".lora_A." in name]:
        layer = int(name.split(".")[2])
        gate = model.model.language_model.layers[layer].mlp.gate.weight
        gate.data += scale["lora_alpha"] / scale["r"] * lora[name.replace("lora_A", "lora_B")] @ lora[name]
    check_logits(golden_case, model, "logits_training_model")


@pytest.mark.golden(where=has_merged_weights)
@with_lora
def test_merged_weights(golden_case: GoldenCase, tmp_path: Path, keep_lora: bool) -> None:
    model, _ = converted(golden_case, tmp_path / "out", keep_lora=keep_lora)
    check_weights(golden_case, model)


@pytest.mark.golden(where=is_checkpoint)
def test_the_receipt_holds_every_tensor_of_every_file(golden_case: GoldenCase, tmp_path: Path) -> None:
    model, receipt = converted(golden_case, tmp_path / "out")
    read = {file: set(records) for file, records in receipt.sources.items()}
    assert read == stored_tensors(golden_case)
    fates = {(r.fate, bool(r.note)) for records in receipt.sources.values() for r in records.values()}
    assert fates == {("consumed", True), ("dropped", True)}
    assert set(receipt.targets) == set(model.state_dict())
    consumed = {r.note for records in receipt.sources.values() for r in records.values() if r.fate == "consumed"}
    assert consumed == set(receipt.targets)
    saved = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert saved == receipt.to_dict()
    assert all(len(record["sha256"]) == 64 for record in saved["targets"].values())
    golden_case.comparisons += 1  # of names, not tensors


@pytest.mark.golden(where=has_expert_files)
def test_the_order_of_the_experts(golden_case: GoldenCase) -> None:
    if (golden_case.path / "layout.json").is_file():
        stored = golden_case.json("layout").get("expert_order")
        assert stored is None or [f"{name}.bin" for name in stored] == list(EXPERT_FILES)[: len(stored)]
    golden_case.comparisons += 1  # of names, not tensors


@pytest.mark.parametrize("eight", [False, True], ids=["plain", "8e"])
@pytest.mark.parametrize("tensor", ["logits_merged", "merged"])
def test_one_changed_golden_value_is_noticed(tensor: str, eight: bool, tmp_path: Path) -> None:
    needed, holds = ((*CHECKPOINT, tensor), is_checkpoint) if tensor == "logits_merged" else ((), has_merged_weights)
    cases = discover(*needed, where=lambda case: holds(case) and has_expert_files(case) == eight)
    if not cases:
        leave_for_lack_of_data()
    changeable_copy(cases[0].path, tmp_path / "case")
    file = tmp_path / "case" / ("io.safetensors" if tensor == "logits_merged" else "merged_weights.safetensors")
    stored = load_file(file)
    name = tensor if tensor == "logits_merged" else next(n for n in stored if n.endswith("experts.1.up_proj.weight"))
    stored[name].view(-1)[7] += 1e-3 * stored[name].abs().max()
    save_file(stored, file)
    case = GoldenCase(tmp_path / "case", ledger=None)
    model, _ = converted(case, tmp_path / "out")
    ours = re.escape(name if tensor == "logits_merged" else "experts.gate_up_proj")
    with pytest.raises(GoldenMismatchError, match=ours):
        (check_logits if tensor == "logits_merged" else check_weights)(case, model, *([name] * (name == tensor)))


def check_logits(case: GoldenCase, model: UniMoeForCausalLM, name: str) -> None:
    with torch.no_grad():
        case.check_if_present(name, model(**original_batch(case, model, prefix="").inputs).logits)


def check_weights(case: GoldenCase, model: UniMoeForCausalLM) -> None:
    state = model.state_dict()
    audio = "whisper" if model.config.speech_connector is not None else "beats"
    stored = load_file(case.path / "merged_weights.safetensors")
    layout = layout_of(stored, {})
    if layout == "deepspeed":
        stored = merge_pairs(stored, case.json("base/config"))
    golden = KeyMap(rules_for(audio, vision_prefix(state), layout)).convert(stored)
    assert set(golden) == set(state)
    for name, expected in golden.items():
        try:
            compare(state[name], expected)
        except GoldenMismatchError as error:
            raise GoldenMismatchError(f"{name}: {error}") from None
    case.comparisons += len(golden)


def folders_of(case: GoldenCase, finetuned: bool = True) -> UniMoeFolders:
    def if_there(name: str) -> Path | None:
        return case.path / name if (case.path / name).exists() else None

    return UniMoeFolders(
        base=case.path / "base",
        clip=case.path / "clip",
        finetuned=case.path / "e2" if finetuned else None,
        whisper=if_there("whisper"),
        beats=next(case.path.glob("*.pt"), None),
        experts=if_there("experts"),
        qformer_config=if_there("qformer_config.json"),
    )


def converted(
    case: GoldenCase, out: Path, finetuned: bool = True, keep_lora: bool = False
) -> tuple[UniMoeForCausalLM, ImportReceipt]:
    """The written model, loaded as users load it; an adapter is merged by PEFT."""
    receipt = run_import(plan_import(folders_of(case, finetuned), keep_lora=keep_lora), out, progress=False)
    model, info = UniMoeForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if receipt.adapter is not None:
        model = PeftModel.from_pretrained(model, out.with_name(receipt.adapter)).merge_and_unload()
    assert (receipt.adapter is not None) == keep_lora
    return model.eval(), receipt


def stored_tensors(case: GoldenCase) -> dict[str, set[str]]:
    folders = folders_of(case)
    found: dict[str, set[str]] = {}
    parts = {"base": folders.base, "clip": folders.clip, "whisper": folders.whisper}
    for label, folder in parts.items():
        for file in Checkpoint(folder).files if folder is not None else []:
            found[f"{label}/{file.name}"] = set(TensorFile(file).tensors)
    written = {"base": folders.base, "finetuned": folders.finetuned, "experts": folders.experts}
    for label, folder in ((label, folder) for label, folder in written.items() if folder is not None):
        for file in (path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors")):
            found[f"{label}/{file.name}"] = set(TensorFile(file).tensors)
    found = {file: names for file, names in found.items() if names}  # the 8-expert saver writes an empty one
    if folders.beats is not None:
        found[f"beats/{folders.beats.name}"] = set(BeatsFile(folders.beats).tensors)
    return found
