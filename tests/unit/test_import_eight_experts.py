"""The 8-expert variant from its folders: what the original's loader ends up with, an adapter, and refusals by name."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from damage import edit_json, rewrite
from peft import PeftModel
from safetensors.torch import load_file
from tiny_eight_experts import PROJECTIONS, EightExperts, eight_experts
from tiny_unimoe import arguments, copied, same_tensors

from unimoe import UniMoeConfig, UniMoeForCausalLM, cli
from unimoe.conversion.checkpoints.key_rules import KeyMap
from unimoe.conversion.checkpoints.llava_keys import vision_prefix
from unimoe.conversion.released.export_unimoe import export_unimoe
from unimoe.conversion.released.import_unimoe import UniMoeFolders, import_unimoe, plan_import
from unimoe.conversion.released.unimoe_experts import EXPERT_FILES
from unimoe.conversion.released.unimoe_keys import rules_for
from unimoe.errors import ConversionError, UniMoeError

TOWERS = ("model.vision_tower", "model.speech_tower")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_type": "dense"},
        {"moe_type": "dense", "num_experts": 4, "num_experts_per_tok": 1},
        {"num_experts": 3},
        {"inner_adapter": True},
    ],
    ids=["sparse", "dense", "four-experts-one-per-token", "three-experts", "adapter-on-dense-mlps"],
)
def test_the_weights_are_those_that_the_original_ends_up_with(tmp_path: Path, options: dict[str, Any]) -> None:
    made = eight_experts(tmp_path, **options)
    receipt = import_unimoe(made.source.folders, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = KeyMap(rules_for("whisper", vision_prefix(written), "deepspeed")).convert(made.weights)
    assert set(written) == set(expected) | {name for name in written if name.startswith(TOWERS)}
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert receipt.variant == "8e"
    fates = {record.fate for records in receipt.sources.values() for record in records.values()}
    assert fates == {"consumed", "dropped"}
    assert any("taken as zero" in note for note in receipt.notes) == options.get("inner_adapter", False)


@pytest.mark.parametrize(
    "options",
    [
        {"audio_expert_indices": [1, 3], "aux_multimodal_loss": True, "aux_multimodal_loss_coef": 0.1},
        {"moe_type": "dense", "num_experts": 4, "num_experts_per_tok": 1},
        {"inner_adapter": True},
    ],
    ids=["sparse", "dense-four-one-per-token", "adapter-on-dense-mlps"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_export_and_import_give_the_same_model_to_the_last_bit(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype | None
) -> None:
    made = eight_experts(tmp_path, **options)
    import_unimoe(made.source.folders, tmp_path / "model", dtype=dtype)
    export_unimoe(tmp_path / "model", tmp_path / "back", max_shard_bytes=20_000)
    back = {name: tmp_path / "back" / name for name in ("base", "clip", "whisper", "experts", "finetuned")}
    import_unimoe(UniMoeFolders(**back), tmp_path / "again")
    assert same_tensors(tmp_path / "model", tmp_path / "again")
    texts = [UniMoeConfig.from_pretrained(tmp_path / name).text_config for name in ("model", "again")]
    assert texts[0].to_dict() == texts[1].to_dict()


def test_the_exported_pairs_and_adapter_are_what_the_original_looks_for(tmp_path: Path) -> None:
    import_unimoe(eight_experts(tmp_path).source.folders, tmp_path / "model")
    export_unimoe(tmp_path / "model", tmp_path / "back")
    base = torch.load(tmp_path / "back" / "base" / "pytorch_model.bin", weights_only=True)
    expert = torch.load(tmp_path / "back" / "finetuned" / "7_mlp_experts.bin", weights_only=True)
    slot = "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts.0."
    for content, module in ((base, "model.layers.1.mlp."), (expert, slot)):
        for projection in PROJECTIONS:
            rows, columns = content[f"{module}{projection}.weight"].shape
            assert content[f"{module}{projection}_lora_A.weight"].shape == (1, columns)
            assert not content[f"{module}{projection}_lora_B.weight"].any()
            assert content[f"{module}{projection}_lora_B.weight"].shape == (rows, 1)
    assert not any(".mlp.deepspeed_moe." in name for name in base)
    assert {path.name for path in (tmp_path / "back" / "experts").iterdir()} == set(EXPERT_FILES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_layers": [1]}, r"sparse layers are \[1\]"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"num_null_experts": 1}, "num_null_experts = 1"),
        ({"router_in_float32": False, "router_pick": "sample_always"}, "router_pick = 'sample_always'"),
    ],
)
def test_what_the_original_cannot_route_is_not_exported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    fields = {"router_in_float32": True, "sparse_layers": [0, 2], **changes}
    model = tiny.model(fields, audio_config=None, sound_connector=None)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConversionError, match=message):
        export_unimoe(tmp_path / "model", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("per_token", "normalised"), [(1, False), (2, True)])
def test_the_configuration_says_how_the_original_routes(tmp_path: Path, per_token: int, normalised: bool) -> None:
    losses = {"aux_kl_loss": True, "aux_kl_loss_coef": 0.05, "aux_balance_loss": False, "aux_balance_loss_coef": 0.1}
    made = eight_experts(tmp_path, num_experts_per_tok=per_token, audio_expert_indices=[1, 3], **losses)
    plan = plan_import(made.source.folders)
    text = plan.config.text_config
    assert (text.num_experts, text.num_experts_per_tok, text.sparse_layers) == (8, per_token, [0, 2])
    assert (text.router_in_float32, text.norm_topk_prob, text.router_pick) == (True, normalised, "max")
    assert (text.router_aux_loss_coef, text.router_divergence_loss_coef) == (0.0, 0.05)
    assert text.router_aux_loss_counts == "first"
    assert text.modality_experts == {"speech": [1, 3]}
    assert any("sample_always" in note for note in plan.notes)
    assert any("router_losses_as_released" in note for note in plan.notes)


@pytest.mark.parametrize("moe_type", ["sparse", "dense"])
def test_an_adapter_holds_the_pairs_of_experts_and_attention(tmp_path: Path, moe_type: str) -> None:
    folders = eight_experts(tmp_path, moe_type=moe_type).source.folders
    import_unimoe(folders, tmp_path / "merged")
    import_unimoe(folders, tmp_path / "kept", keep_lora=True)
    merged, kept = (UniMoeForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("merged", "kept"))
    with_adapter = PeftModel.from_pretrained(kept, tmp_path / "kept-lora")
    state = with_adapter.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_the_command_reads_expert_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = eight_experts(tmp_path).source.folders
    assert cli.main(arguments(folders, tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    for said in ("8e", "experts/mlp_base.bin", "layer 1 has no experts", "replaced by experts/mlp_basev.bin"):
        assert said in shown


def test_the_base_may_carry_the_configuration_beside_that_of_its_own_model(tmp_path: Path) -> None:
    folders = eight_experts(tmp_path).source.folders
    (folders.base / "config.json").rename(folders.base / "8config.json")
    (folders.base / "config.json").write_text("{}")
    with pytest.raises(
        ConversionError, match=r"gate\.wg\.weight \(the 8-expert model's routers come with --finetuned\)"
    ):
        plan_import(dataclasses.replace(folders, finetuned=None))


def _e2(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[UniMoeFolders], object]:
    return lambda folders: rewrite(folders.finetuned / name, change)


SLOT = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts."


def _swap(one: Path, other: Path) -> None:
    aside = one.rename(one.with_suffix(".aside"))
    other.rename(one)
    aside.rename(other)


DAMAGES: dict[str, tuple[Callable[[UniMoeFolders], object], str]] = {
    "expert file missing": (lambda f: (f.experts / "mlp_base4.bin").unlink(), r"mlp_base4\.bin is missing"),
    "expert file truncated": (
        lambda f: (f.experts / "mlp_base.bin").write_bytes((f.experts / "mlp_base.bin").read_bytes()[:500]),
        r"mlp_base\.bin is truncated",
    ),
    "fine-tuned expert missing": (
        lambda f: (f.finetuned / "5_mlp_experts.bin").unlink(),
        r"5_mlp_experts\.bin is missing",
    ),
    "no expert folder": (lambda f: shutil.rmtree(f.experts), r"experts is no folder"),
    "tensor of an expert missing": (
        lambda f: (
            rewrite(f.experts / "mlp_basev.bin", lambda t: t.pop("model.layers.0.mlp.up_proj.weight")),
            rewrite(f.finetuned / "1_mlp_experts.bin", lambda t: t.pop(f"{SLOT}0.up_proj.weight")),
        ),
        r"mlp_basev\.bin lacks model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "expert files that changed places": (
        lambda f: _swap(f.finetuned / "0_mlp_experts.bin", f.finetuned / "3_mlp_experts.bin"),
        r"finetuned/0_mlp_experts\.bin holds other values than experts/mlp_audiocap\.bin",
    ),
    "expert file that is there twice": (
        lambda f: shutil.copyfile(f.experts / "mlp_base1.bin", f.experts / "mlp_base4.bin"),
        r"finetuned/4_mlp_experts\.bin holds other values than experts/mlp_base4\.bin",
    ),
    "half a pair": (
        _e2("3_mlp_experts.bin", lambda t: t.pop(f"{SLOT}0.up_proj_lora_B.weight")),
        r"3_mlp_experts\.bin lacks model\.layers\.0\.mlp\.up_proj_lora_B\.weight",
    ),
    "pair of another rank": (lambda f: edit_json(f.finetuned / "config.json", lora_r=5), r"rank 5 asks for others"),
    "no scale": (lambda f: edit_json(f.finetuned / "config.json", lora_alpha=None), r"lora_alpha = None"),
    "several slots": (
        _e2("0_mlp_experts.bin", lambda t: t.update({f"{SLOT}1.up_proj.weight": torch.ones(2, 2)})),
        r"0_mlp_experts\.bin holds experts of 2 slots",
    ),
    "unknown tensor of an expert": (
        lambda f: rewrite(f.experts / "mlp_base.bin", lambda t: t.update({"model.layers.0.mlp.extra.weight": t})),
        r"mlp_base\.bin holds more than named, dense tensors",
    ),
    "unknown part of an expert": (
        _e2("2_mlp_experts.bin", lambda t: t.update({f"{SLOT}0.extra.weight": torch.ones(2)})),
        r"unexpected tensor.*2_mlp_experts\.bin: .*extra",
    ),
    "router of another size": (
        _e2("mlp_gates.bin", lambda t: t.update({n: torch.ones(7, v.shape[1]) for n, v in list(t.items())})),
        r"num_experts = 8 but the tensors show 7",
    ),
    "router missing": (
        _e2("mlp_gates.bin", lambda t: t.pop("model.layers.2.mlp.deepspeed_moe.gate.wg.weight")),
        r"Missing: model\.layers\.2\.mlp\.deepspeed_moe\.gate\.wg\.weight",
    ),
    "no layers": (lambda f: edit_json(f.finetuned / "config.json", moe_type="some"), r"moe_type 'some'"),
    "maps before the routers": (
        _e2("fm_adapter.bin", lambda t: t.update({"model.layers.0.mlp.deepspeed_moe.fm_text.weight": torch.ones(1)})),
        r"unexpected tensor.*fm_adapter\.bin",
    ),
    "maps are configured": (lambda f: edit_json(f.finetuned / "config.json", use_fm_block=True), r"use_fm_block"),
    "experts that are not there": (
        lambda f: edit_json(
            f.finetuned / "config.json",
            image_expert_indices=[0, 9],
            aux_multimodal_loss=True,
            aux_multimodal_loss_coef=0.1,
        ),
        r"modality_experts\['image'\] is \[0, 9\]",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> EightExperts:
    return eight_experts(tmp_path_factory.mktemp("released"))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_and_nothing_is_written(whole: EightExperts, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folders = copied(whole.source.folders, tmp_path)
    damage(folders)
    with pytest.raises(UniMoeError, match=message):
        import_unimoe(folders, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_what_changes_nothing_is_noted(whole: EightExperts, tmp_path: Path) -> None:
    folders = copied(whole.source.folders, tmp_path)
    edit_json(folders.finetuned / "config.json", image_expert_indices=[0, 9])
    shutil.copyfile(folders.finetuned / "7_mlp_experts.bin", folders.finetuned / "8_mlp_experts.bin")
    plan = plan_import(folders)
    assert plan.config.text_config.modality_experts == {"image": [0]}
    assert any(note.startswith("image_expert_indices: without") for note in plan.notes)
    assert any("not read, as in the original: 8_mlp_experts.bin of" in note for note in plan.notes)


def test_the_expert_folder_is_asked_for_and_refused_where_it_does_not_belong(
    whole: EightExperts, tmp_path: Path
) -> None:
    folders = copied(whole.source.folders, tmp_path)
    with pytest.raises(ConversionError, match=r"8-expert variant.*add --experts DIR"):
        plan_import(dataclasses.replace(folders, experts=None))
    config = json.loads((folders.base / "config.json").read_text())
    plain = {n: v for n, v in config.items() if n not in ("moe_type", "ep_size", "lora_r", "num_experts")}
    (folders.base / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ConversionError, match="belong to the 8-expert variant"):
        plan_import(dataclasses.replace(folders, finetuned=None))


def test_what_one_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    folders = eight_experts(tmp_path, inner_adapter=True).source.folders
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.gate_proj\.weight has factors .*without --keep-lora"):
        import_unimoe(folders, tmp_path / "out", keep_lora=True)
    assert not (tmp_path / "out").exists()
