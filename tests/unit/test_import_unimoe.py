"""Released Uni-MoE folders: converted as their own loader reads them, exported back, and refused when damaged."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_unimoe import ALPHA, RANK, Released, base_weights, released
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.export_unimoe import export_unimoe
from unimoe.conversion.import_unimoe import UniMoeFolders, import_unimoe, plan_import, run_import
from unimoe.conversion.unimoe_keys import ALIGNER, KeyMap, rules_for, vision_prefix
from unimoe.errors import ConversionError

AUDIOS = ("whisper", "beats")


def arguments(folders: UniMoeFolders, out: Path) -> list[str]:
    options = {name.replace("_", "-"): value for name, value in dataclasses.asdict(folders).items()}
    flags = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return ["convert", "unimoe", *flags, "--out", str(out)]


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("audio", AUDIOS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "max_shard_bytes": 20_000},
        {"image_connector": tiny.connector(depth=1), "vision_feature_select_strategy": "full"},
        {"text": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, "num_experts": 3}},
        {"text": {"sparse_layers": [0, 1, 2], "num_experts_per_tok": 1}},
    ],
    ids=["plain", "bf16-shards", "linear-projector", "rope", "every-layer"],
)
def test_export_and_import_give_the_same_model_to_the_last_bit(
    tmp_path: Path, audio: Any, options: dict[str, Any]
) -> None:
    source = released(tmp_path, audio, finetuned=False, **options)
    import_unimoe(source.folders, tmp_path / "again")
    assert same_tensors(source.ours, tmp_path / "again")
    before, after = (UniMoeForCausalLM.from_pretrained(folder) for folder in (source.ours, tmp_path / "again"))
    patches = 5 if options.get("vision_feature_select_strategy") == "full" else 4
    with torch.no_grad():
        # Placeholder ids follow the vocabulary now.
        logits = [
            model(torch.tensor([[1, *[model.config.image_token_id] * patches, 5, 6]]), **tiny.media(images=1)).logits
            for model in (before, after)
        ]
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("audio", AUDIOS)
def test_fine_tuned_files_are_laid_over_the_base_in_the_order_of_the_original(tmp_path: Path, audio: Any) -> None:
    source = released(tmp_path, audio, max_shard_bytes=30_000)
    folders = source.folders
    import_unimoe(folders, tmp_path / "out")

    wanted = base_weights(folders.base)
    later: dict[str, dict[str, torch.Tensor]] = {}
    for file in ("non_lora_trainables", "adapter_model", "mm_audio_aligner", "mlp_gates"):
        content = torch.load(folders.finetuned / f"{file}.bin", weights_only=True)
        later[file] = {name.removeprefix("base_model.model."): tensor for name, tensor in content.items()}
    wanted |= later["non_lora_trainables"]
    lora = later["adapter_model"]
    for name in [name for name in wanted if name.replace(".weight", ".lora_A.weight") in lora]:
        a, b = (lora[name.replace(".weight", f".lora_{factor}.weight")] for factor in "AB")
        wanted[name] = wanted[name] + ALPHA / RANK * (b @ a)
    wanted |= later["mm_audio_aligner"]
    wanted |= {name: tensor for name, tensor in later["mlp_gates"].items() if ".lora_" not in name}

    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = KeyMap(rules_for(audio, vision_prefix(written))).convert(wanted)
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-6)
    towers = {name for name in written if name.startswith(("model.vision_tower", "model.speech_tower", "model.audio"))}
    assert set(written) == set(expected) | towers


def test_the_command_reports_and_keeps_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = released(tmp_path)
    assert cli.main([*arguments(source.folders, tmp_path / "merged"), "--dtype", "bf16"]) == 0
    assert cli.main([*arguments(source.folders, tmp_path / "kept"), "--keep-lora"]) == 0
    shown = capsys.readouterr().out
    assert "speech_dp" in shown
    assert "kept-lora" in shown
    assert "replaced by finetuned/mlp_gates.bin" in shown
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert sorted(path.name for path in (tmp_path / "kept-lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    # Routers have no adapter: the original does not load theirs.
    assert not [name for name in load_file(tmp_path / "kept-lora" / "adapter_model.safetensors") if ".gate." in name]
    assert cli.main(["convert", "export-unimoe", str(tmp_path / "kept"), "--out", str(tmp_path / "back")]) == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["base", "clip", "whisper"]


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def _edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _base(source: Released, change: Callable[[dict[str, Any]], object]) -> None:
    _rewrite(source.folders.base / "pytorch_model.bin", change)


def _e2(source: Released, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    _rewrite(source.folders.finetuned / name, change)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of a pickle ran')",))


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
GATE_LORA = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Released], object], str]] = {
    "truncated base": (lambda s: _truncate(s.folders.base / "pytorch_model.bin"), r"pytorch_model\.bin is truncated"),
    "truncated adapter": (
        lambda s: _truncate(s.folders.finetuned / "adapter_model.bin"),
        r"adapter_model\.bin is truncated",
    ),
    "truncated encoder": (
        lambda s: _truncate(s.folders.clip / "model.safetensors"),
        r"model\.safetensors has \d+ byt",
    ),
    "empty file": (lambda s: (s.folders.finetuned / "mlp_gates.bin").write_bytes(b""), r"mlp_gates\.bin is empty"),
    "no gates": (lambda s: (s.folders.finetuned / "mlp_gates.bin").unlink(), r"mlp_gates\.bin is missing"),
    "no adapter": (lambda s: (s.folders.finetuned / "adapter_model.bin").unlink(), r"adapter_model\.bin is missing"),
    "no weights": (lambda s: (s.folders.base / "pytorch_model.bin").unlink(), r"base holds no model\.safetensors"),
    "no configuration": (lambda s: (s.folders.base / "config.json").unlink(), r"base.config\.json is missing"),
    "unknown tensor": (
        lambda s: _base(s, lambda t: t.update({"model.layers.0.extra": torch.ones(2)})),
        r"^1 unexpected tensor.*base/pytorch_model\.bin: model\.layers\.0\.extra",
    ),
    "unknown encoder tensor": (
        lambda s: _edit_json(s.folders.clip / "config.json", num_hidden_layers=2),
        r"unexpected tensor.*clip/model\.safetensors: vision_model\.encoder\.layers\.2",
    ),
    "adapter of something else": (
        lambda s: _e2(s, "adapter_model.bin", lambda t: t.update({"model.nothing.lora_A.weight": torch.ones(2, 3)})),
        r"unexpected tensor.*adapter_model\.bin: model\.nothing",
    ),
    "half an adapter": (
        lambda s: _e2(s, "adapter_model.bin", lambda t: t.pop(GATE_LORA)),
        r"without its other factor",
    ),
    "adapter of another rank": (
        lambda s: _edit_json(s.folders.finetuned / "adapter_config.json", r=7),
        r"rank 7 asks for others",
    ),
    "adapter that is more than LoRA": (
        lambda s: _edit_json(s.folders.finetuned / "adapter_config.json", use_dora=True),
        r"use_dora = True",
    ),
    "tensor missing": (
        lambda s: _base(s, lambda t: t.pop("model.norm.weight")),
        r"cannot be made.*of model\.norm\.weight",
    ),
    "expert tensor missing": (lambda s: _base(s, lambda t: t.pop(EXPERT)), r"lacks weights of expert 1"),
    "router missing": (
        lambda s: (
            _base(s, lambda t: t.pop("model.layers.0.mlp.gate.weight")),
            _e2(s, "mlp_gates.bin", lambda t: t.pop("model.layers.0.mlp.gate.weight")),
        ),
        r"Missing: model\.layers\.0\.mlp\.gate\.weight",
    ),
    "wrong shape": (
        lambda s: _base(s, lambda t: t.update({"lm_head.weight": torch.ones(95, 32)})),
        r"lm_head\.weight of shape \[95, 32\]",
    ),
    "experts of two shapes": (
        lambda s: (
            _base(s, lambda t: t.update({EXPERT: torch.ones(40, 32)})),
            _e2(s, "adapter_model.bin", lambda t: [t.pop(n) for n in list(t) if ".experts.1.up_proj." in n]),
        ),
        r"differ in shape",
    ),
    "no audio side": (
        lambda s: (
            _base(s, lambda t: [t.pop(n) for n in list(t) if n.startswith(ALIGNER)]),
            (s.folders.base / "mm_audio_aligner.bin").unlink(),
            _e2(s, "mm_audio_aligner.bin", lambda t: [t.pop(n) for n in list(t) if n.startswith(ALIGNER)]),
        ),
        r"cannot be recognised.*mm_audio_aligner\.decoder.*mm_audio_aligner\.qformer",
    ),
    "two audio sides": (
        lambda s: _base(s, lambda t: t.update({f"{ALIGNER}qformer.qformer.layernorm.weight": torch.ones(2)})),
        r"holds both",
    ),
    "configuration of another model": (
        lambda s: _edit_json(s.folders.finetuned / "config.json", num_experts=5),
        r"num_experts = 5 but the tensors show 4",
    ),
    "dense configuration": (lambda s: _edit_json(s.folders.finetuned / "config.json", moe=None), r"moe: null"),
    "8 experts": (lambda s: _edit_json(s.folders.finetuned / "config.json", moe_type="dense"), r"8-expert variant"),
    "encoder of another kind": (
        lambda s: _edit_json(s.folders.clip / "config.json", model_type="siglip"),
        r"describes a 'siglip' model",
    ),
    "pickle with code": (
        lambda s: (s.folders.base / "pytorch_model.bin").write_bytes(pickle.dumps({"x": _Code()})),
        r"cannot be read as plain tensors",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return released(tmp_path_factory.mktemp("released"))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_and_nothing_is_written(whole: Released, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    shutil.copytree(whole.folders.base.parent, tmp_path / "released")
    moved = {n: tmp_path / "released" / p.name for n, p in dataclasses.asdict(whole.folders).items() if p is not None}
    source = dataclasses.replace(whole, folders=UniMoeFolders(**moved))
    damage(source)
    with pytest.raises(ConversionError, match=message):
        import_unimoe(source.folders, tmp_path / "out", keep_lora=True)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    base = released(tmp_path, finetuned=False, max_shard_bytes=20_000).folders
    shard = sorted(base.base.glob("pytorch_model-*.bin"))[1]
    index = base.base / "pytorch_model.bin.index.json"
    hidden = shard.rename(tmp_path / "hidden")
    with pytest.raises(ConversionError, match=rf"{shard.name} is missing"):
        plan_import(base)
    hidden.rename(shard)
    index.unlink()
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin\.index\.json"):
        plan_import(base)


def test_tables_that_should_be_shared_must_be_equal(tmp_path: Path) -> None:
    source = released(tmp_path, "beats")
    name = "encoder.layers.1.self_attn.relative_attention_bias.weight"
    _rewrite(source.folders.beats, lambda content: content["model"].update({name: content["model"][name] + 1}))
    with pytest.raises(ConversionError, match="share one such table"):
        import_unimoe(source.folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("audio", "field", "flag"), [("whisper", "whisper", "--whisper"), ("beats", "beats", "--beats")]
)
def test_the_missing_encoder_is_asked_for(tmp_path: Path, audio: Any, field: str, flag: str) -> None:
    folders = released(tmp_path, audio).folders
    with pytest.raises(ConversionError, match=flag):
        plan_import(dataclasses.replace(folders, **{field: None}))


def test_the_heads_of_a_small_q_former_cannot_be_guessed(tmp_path: Path) -> None:
    folders = released(tmp_path, "beats").folders
    with pytest.raises(ConversionError, match="--qformer-config"):
        plan_import(dataclasses.replace(folders, qformer_config=None))


def test_only_what_the_original_computes_is_exported(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "both")
    with pytest.raises(ConversionError, match="connectors are"):
        export_unimoe(tmp_path / "both", tmp_path / "out")
    tiny.model(audio_config=None, sound_connector=None, video_pooling="none").save_pretrained(tmp_path / "frames")
    with pytest.raises(ConversionError, match="video_pooling"):
        export_unimoe(tmp_path / "frames", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("audio", AUDIOS)
def test_with_a_tokenizer_the_folder_is_complete(tmp_path: Path, audio: Any) -> None:
    folders = released(tmp_path, audio).folders
    words = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "What", "is", "this", "?"])
    }
    tokenizer = Tokenizer(models.WordLevel(words | {f"w{i}": i for i in range(9, 96)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folders.base)
    pictures = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "do_resize": True}
    crop = {"crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "image_mean": [0.5] * 3}
    (folders.clip / "preprocessor_config.json").write_text(json.dumps({**pictures, **crop, "image_std": [0.5] * 3}))
    if folders.whisper is not None:
        (folders.whisper / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80, "chunk_length": 1}))
    receipt = import_unimoe(folders, tmp_path / "out")
    assert not receipt.notes

    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "out")
    picture = torch.zeros(20, 24, 3, dtype=torch.uint8).numpy()
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this ?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    # The four placeholders follow the 96 words; the embedding table did not grow.
    assert ids.count(model.config.image_token_id) == 4
    assert min(i for i in model.config.placeholder_ids.values()) == 96
    assert model.get_input_embeddings().num_embeddings == 96
    assert ids[-5:] == [words[w] for w in ("What", "is", "this", "?", "ASSISTANT:")]
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] <= len(ids) + 3
    assert processor.feature_extractor.speech == (audio == "whisper")
    export_unimoe(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "clip" / "preprocessor_config.json").is_file()


_PEAK = """
import pathlib, re, sys
from unimoe.conversion.import_unimoe import UniMoeFolders, plan_import, run_import

def memory(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

def plan(folder):
    return plan_import(UniMoeFolders(**{n: folder / d for n, d in zip(("base", "clip", "whisper", "finetuned"),
                                                                      ("base", "clip", "whisper", "e2"))}))

small, large, out = map(pathlib.Path, sys.argv[1:])
run_import(plan(small), out / "small", progress=False)  # everything is imported and set up now
planned = plan(large)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = memory("VmRSS")
run_import(planned, out / "large", progress=False)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux shows it")
def test_memory_holds_no_more_than_a_shard_and_a_fifth(whole: Released, tmp_path: Path) -> None:
    text = {"intermediate_size": 4096, "num_experts": 20, "num_hidden_layers": 2, "sparse_layers": [0, 1]}
    base = released(tmp_path, text=text, max_shard_bytes=16 << 20).folders.base
    sizes = [path.stat().st_size for path in base.glob("pytorch_model-*.bin")]
    assert sum(sizes) > 3 * max(sizes)
    folders = (whole.folders.base.parent, base.parent, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *map(str, folders)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    slack = 8 << 20  # allocators and file buffers; two shards at once would not fit
    assert int(done.stdout) <= 1.2 * max(sizes) + slack < 2 * max(sizes)


def test_the_same_plan_written_twice_is_the_same(tmp_path: Path) -> None:
    plan = plan_import(released(tmp_path).folders)
    first, second = (run_import(plan, tmp_path / name, progress=False) for name in ("a", "b"))
    assert first.targets == second.targets
    assert same_tensors(tmp_path / "a", tmp_path / "b")
