"""Checkpoints of MoIIE's code: every architecture there and back, what the tower is, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_moiie
import torch
from damage import on_a_bad_disk
from safetensors.torch import load_file
from tiny_tokenizer import save_word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.checkpoints.checkpoint_writer import write_checkpoint
from unimoe.conversion.released.export_moiie import export_moiie
from unimoe.conversion.released.import_moiie import import_moiie, plan_moiie
from unimoe.conversion.released.moiie_variant import MODEL_TYPES
from unimoe.conversion.upcycling.group_presets import group_preset
from unimoe.conversion.upcycling.sparsity import Sparsity
from unimoe.conversion.upcycling.upcycle import upcycle_model
from unimoe.errors import ConversionError

POOLS = {"num_vis_experts": 3, "num_lan_experts": 2}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, POOLS if MODEL_TYPES[name][0] == "separate" else {}) for name in MODEL_TYPES),
    ("bunny-mm-phi3-moe-s", {"use_s2": True, "dtype": torch.bfloat16, "shards": 3}),
    ("bunny-llama3-moe", {"num_experts": 3, "sees": False}),
    ("bunny-mm-llama3-moe-s", {"num_experts": 8}),
    ("bunny-mm-phi3-moe-s", {"num_experts": 6, "num_experts_per_tok": 1}),
]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def change(folder: Path, edit: Any) -> None:
    weights = stored(folder)
    edit(weights)
    tiny_moiie.save(folder, weights)


@pytest.mark.parametrize(
    ("model_type", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_architecture_survives_the_way_there_and_back(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, model_type, **options)
    receipt = import_moiie(str(folder), tmp_path / "out")
    kind, backbone, architecture = MODEL_TYPES[model_type]
    assert receipt.variant == f"{kind}-{backbone}"
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.route_run_end_as_text == (kind in ("moiie", "separate", "modality"))
    export_moiie(tmp_path / "out", tmp_path / "back")
    before, after = stored(folder), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    dropped = {name for records in receipt.sources.values() for name, r in records.items() if "no router" in r.note}
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(0 * value if name in dropped else value, after[name]), name
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == (model_type, [architecture])
    import_moiie(str(tmp_path / "back"), tmp_path / "again")
    one, two = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


def test_separate_pools_are_disjoint_groups(tmp_path: Path) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-phi3-moe", **POOLS)
    receipt = import_moiie(str(folder), tmp_path / "out")
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config.text_config
    assert config.expert_groups == {"language": [3, 4], "vision": [0, 1, 2]}
    assert config.aux_loss_coefs == [0.04, 0.04]  # 0.02 each, twice: an even load costs the original k
    assert any("(0.04) are 2 times the original's numbers" in note for note in receipt.notes)
    before, mlp = stored(folder), model.model.language_model.layers[1].mlp
    for ours, original in ((0, "vis_experts.0"), (2, "vis_experts.2"), (3, "lan_experts.0"), (4, "lan_experts.1")):
        assert torch.equal(
            mlp.experts.gate_up_proj[ours], before[f"model.layers.1.mlp.{original}.gate_up_proj.weight"]
        )
    assert torch.equal(mlp.gate.weight[:2], before["model.layers.1.mlp.gate.weight"])
    assert torch.equal(mlp.gate.weight[2:], before["model.layers.1.mlp.gate_vis.weight"])


def test_experts_that_no_router_reaches_are_left_out(tmp_path: Path) -> None:
    """The original's language routers begin at expert 1 whatever the number, so of 8 experts the last is dead."""
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-llama3-moe-s", num_experts=8)
    receipt = import_moiie(str(folder), tmp_path / "out")
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.text_config.expert_groups == {"language": [*range(1, 7)], "vision": [*range(6)]}
    dropped = {n for n, r in receipt.sources["checkpoint/model.safetensors"].items() if r.fate == "dropped"}
    assert dropped == {n for n in stored(folder) if ".experts.7." in n}
    assert any("experts [7] left out" in note for note in receipt.notes)


def test_a_freshly_converted_checkpoint_has_no_routers_yet(tmp_path: Path) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-phi3-moe-s", sees=False)
    change(folder, lambda weights: [weights.pop(n) for n in list(weights) if ".gate" in n and "gate_up" not in n])
    receipt = import_moiie(str(folder), tmp_path / "out")
    assert any("drawn" in note for note in receipt.notes)
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "out")
    gates = [model.model.language_model.layers[i].mlp.gate.weight for i in (1, 3)]
    assert all(gate.shape == (6, tiny_moiie.HIDDEN) for gate in gates)
    assert 0.01 < float(gates[0].std()) < 0.03
    assert not torch.equal(gates[0], gates[1])


def test_a_disk_that_writes_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-phi3-moe", sees=False)
    assert import_moiie(str(folder), tmp_path / "out").tensors_read_back == len(stored(tmp_path / "out"))
    monkeypatch.setattr("unimoe.conversion.checkpoints.read_back.write_checkpoint", on_a_bad_disk(write_checkpoint))
    with pytest.raises(ConversionError, match="reads back differently"):
        import_moiie(str(folder), tmp_path / "again")
    with pytest.raises(ConversionError, match="reads back differently"):
        export_moiie(tmp_path / "out", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out"}


@pytest.mark.parametrize("trained", [True, False])
def test_whose_weights_the_tower_has(tmp_path: Path, trained: bool) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-phi3", unfreeze_vision_tower=trained)
    name = "vision_model.embeddings.patch_embedding.bias"
    change(folder, lambda weights: weights.update({f"model.vision_tower.vision_tower.{name}": torch.ones(16)}))
    receipt = import_moiie(str(folder), tmp_path / "out")
    state = UniMoeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    bias = next(value for key, value in state.items() if key.endswith("patch_embedding.bias"))
    assert bool((bias == 1).all()) == trained
    fates = {file: {r.fate for r in records.values()} for file, records in receipt.sources.items()}
    assert fates["vision_tower/model.safetensors"] == ({"dropped"} if trained else {"consumed"})
    assert ("dropped" in fates["checkpoint/model.safetensors"]) != trained


def test_a_tower_that_only_its_folder_holds(tmp_path: Path) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-llama")
    change(folder, lambda weights: [weights.pop(n) for n in list(weights) if "vision_tower" in n])
    import_moiie(str(folder), tmp_path / "out", vision_tower=str(tmp_path / "siglip"))
    (tmp_path / "siglip" / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="vision tower's weights"):
        plan_moiie(str(folder))


def test_with_a_tokenizer_the_folder_answers(tmp_path: Path) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-phi3-moe-s", use_s2=True)
    words = ["<unk>", "<s>", "<|endoftext|>", "USER:", "ASSISTANT:", "What", "is", "this", "?"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(9, 96))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    receipt = import_moiie(str(folder), tmp_path / "out")
    assert not any("processor" in note for note in receipt.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "out")
    content = [
        {"type": "image", "image": torch.zeros(20, 24, 3, dtype=torch.uint8).numpy()},
        {"type": "text", "text": "What is this ?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (1, 3, 84, 84)  # three times the tower's size
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    assert processor.image_aspect_ratio == "pad"
    answer = model.generate(**inputs, max_new_tokens=3)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    export_moiie(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["use_s2"] is True
    settings = json.loads((tmp_path / "back" / "siglip" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 28, "width": 28}


def test_a_language_model_alone_keeps_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-llama3-moe-s", sees=False)
    save_word_tokenizer(folder)
    assert cli.main(["convert", "moiie", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "a language model alone" in shown
    assert "Warning" not in shown
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    )  # no placeholders, which it lacks
    assert (
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)" in (tmp_path / "out" / "README.md").read_text()
    )
    inputs = tokenizer("The capital of", return_tensors="pt")
    assert UniMoeForCausalLM.from_pretrained(tmp_path / "out").generate(**inputs, max_new_tokens=2).shape == (1, 5)
    export_moiie(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_a_language_model_without_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-phi3", sees=False)
    assert cli.main(["convert", "moiie", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "no tokenizer: the checkpoint's folder holds neither tokenizer.model nor tokenizer.json" in shown
    assert "Warning: The folder has no tokenizer" in shown


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-llama3-moe-s")
    arguments = ["convert", "moiie", str(folder), "--vision-tower", str(tmp_path / "siglip"), "--dtype", "bf16"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert {value.dtype for value in stored(tmp_path / "out").values()} == {torch.bfloat16}
    assert cli.main(["convert", "export-moiie", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    shown = capsys.readouterr().out
    assert "moiie-llama" in shown
    assert "experts of vision [0, 1, 2], of language [1, 2, 3], 2 per token" in shown
    for file in ("receipt.json", "README.md", "modeling_unimoe.py", "generation_config.json"):
        assert (tmp_path / "out" / file).is_file()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    inspected = capsys.readouterr().out
    assert "vision: image, video -> experts [0, 1, 2]" in inspected
    receipt = shown[shown.index("Receipt\n") + len("Receipt\n") : shown.index("Saved in")]
    assert "read        checkpoint/model.safetensors: " in receipt
    assert "".join(f"  {line}\n" for line in receipt.splitlines()) in inspected


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda w: w.pop("model.layers.1.mlp.experts.2.down_proj.weight"), "experts"),
        (lambda w: w.pop("model.layers.3.mlp.gate.weight"), "model.layers.3.mlp.gate.weight is missing"),
        (lambda w: w.pop("model.layers.2.input_layernorm.weight"), "model.layers.2.input_layernorm"),
        (lambda w: w.pop("model.layers.2.self_attn.o_proj.weight"), "cannot be made"),
        (lambda w: w.update({"model.layers.0.extra.weight": torch.ones(1)}), "1 unexpected tensor"),
        (lambda w: w.update({"model.layers.0.self_attn.qkv_proj.weight": torch.ones(65, 32)}), "ask for 64 rows"),
        (lambda w: w.update({"model.layers.1.mlp.gate_vis.weight": torch.ones(2, 32)}), "gate_vis"),
        (lambda w: w.update({"model.layers.0.mlp.gate.weight": torch.ones(3, 32)}), "layer|experts"),
        (lambda w: w.pop("model.mm_projector.0.weight"), "projector"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path, edit: Any, words: str) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-phi3-moe-s")
    change(folder, edit)
    with pytest.raises(ConversionError, match=words):
        import_moiie(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bunny-phi3-moe"}, "tensors are those of moiie on phi3"),
        ({"model_type": "bunny-mm-llama3-moe-s"}, "tensors are those of moiie on phi3"),
        ({"num_hidden_layers": 8}, "the tensors show 4"),
        ({"num_experts": 4, "num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mm_vision_tower": "google/siglip"}, "--vision-tower"),
        ({"hidden_size": "wide"}, "Phi3Config"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-phi3-moe-s")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    with pytest.raises(ConversionError, match=words):
        plan_moiie(str(folder))


def test_other_towers_are_refused(tmp_path: Path) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-llama")
    (tmp_path / "siglip" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ConversionError, match="not a SigLIP tower"):
        plan_moiie(str(folder))


@pytest.mark.parametrize("sees", [True, False])
def test_what_was_upcycled_here_goes_to_the_original(tmp_path: Path, sees: bool) -> None:
    """A picture's last feature is language there; so a model that sees has to take that up first."""
    import_moiie(str(tiny_moiie.checkpoint(tmp_path, "bunny-llama", sees=sees)), tmp_path / "dense")
    groups = dict(zip(("expert_groups", "modality_groups"), group_preset("moiie", 4), strict=True))
    dense = UniMoeForCausalLM.from_pretrained(tmp_path / "dense")
    upcycle_model(dense, Sparsity(4, 2, [1, 3], **groups)).save_pretrained(tmp_path / "sparse")
    if sees:
        with pytest.raises(ConversionError, match=r'set "route_run_end_as_text": true in its config\.json'):
            export_moiie(tmp_path / "sparse", tmp_path / "back")
        path = tmp_path / "sparse" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"route_run_end_as_text": True}))
    export_moiie(tmp_path / "sparse", tmp_path / "back")
    receipt = import_moiie(str(tmp_path / "back"), tmp_path / "again")
    assert receipt.variant == "moiie-llama"
    before, after = stored(tmp_path / "sparse"), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_helps_say_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for command in ("moiie", "export-moiie"):
        with pytest.raises(SystemExit):
            cli.main(["convert", command, "--help"])
        shown[command] = capsys.readouterr().out
        assert "examples:" in shown[command]
    for file in ("config.json", "*.safetensors or pytorch_model*.bin", "tokenizer.model or tokenizer.json"):
        assert file in shown["moiie"]
    assert '"route_run_end_as_text": true' in shown["export-moiie"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"route_run_end_as_text": False}, "route_run_end_as_text"),
        ({"vision_scales": [1, 2]}, "vision_scales"),
        ({"text": {"sparse_layers": [0, 2]}}, "in \\[1, 3\\]"),
        ({"text": {"norm_topk_prob": False}}, "norm_topk_prob"),
        ({"text": {"expert_groups": {"vision": [0, 3], "language": [1, 2, 3]}}}, "Vision chooses"),
        ({"text": {"moe_intermediate_size": 24}}, "wide"),
        ({"backbone": "llama"}, "sliding_window"),
    ],
)
def test_only_what_the_original_computes_is_exported(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    folder = tiny_moiie.checkpoint(tmp_path, "bunny-mm-phi3-moe-s")
    import_moiie(str(folder), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    written = json.loads(path.read_text())
    backbone, text = fields.pop("backbone", None), fields.pop("text", {})
    if "vision_scales" in fields:
        written["image_connector"]["input_size"] = 32
    written["text_config"] |= text
    path.write_text(json.dumps(written | fields))
    with pytest.raises(ConversionError, match=words):
        export_moiie(tmp_path / "out", tmp_path / "back", backbone=backbone)
    assert not (tmp_path / "back").exists()
