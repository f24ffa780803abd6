"""Released Uni-MoE folders: converted as their own loader reads them, exported back, and refused when damaged."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from hub_stand_in import running_hub
from safetensors.torch import load_file, save_file
from tiny_unimoe import ALPHA, RANK, Released, arguments, base_weights, released, same_tensors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.checkpoints.key_rules import KeyMap
from unimoe.conversion.checkpoints.llava_keys import vision_prefix
from unimoe.conversion.dense import tokenizer_files
from unimoe.conversion.released.export_unimoe import export_unimoe
from unimoe.conversion.released.import_unimoe import UniMoeFolders, import_unimoe, plan_import, run_import
from unimoe.conversion.released.unimoe_keys import rules_for
from unimoe.errors import ConversionError

AUDIOS = ("whisper", "beats")


@pytest.mark.parametrize("audio", AUDIOS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "max_shard_bytes": 20_000},
        {"image_connector": tiny.connector(depth=1), "vision_feature_select_strategy": "full"},
        {
            "text": {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
                "num_experts": 3,
            }
        },
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


def test_encoders_may_come_as_whole_models(tmp_path: Path) -> None:
    folders = released(tmp_path).folders
    import_unimoe(folders, tmp_path / "parts")
    vision = json.loads((folders.clip / "config.json").read_text())
    text = {"text_model.embeddings.position_ids": torch.arange(4), "logit_scale": torch.ones(())}
    halves = load_file(folders.clip / "model.safetensors") | text | {"text_projection.weight": torch.ones(2, 2)}
    halves["vision_model.embeddings.position_ids"] = torch.arange(5)
    (folders.clip / "model.safetensors").unlink()
    torch.save(halves, folders.clip / "pytorch_model.bin")
    (folders.clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    encoder = load_file(folders.whisper / "model.safetensors")
    whole = {f"model.{name}": tensor for name, tensor in encoder.items()} | {"model.decoder.x": torch.ones(1)}
    save_file(whole, folders.whisper / "model.safetensors")
    import_unimoe(folders, tmp_path / "wholes")
    assert same_tensors(tmp_path / "parts", tmp_path / "wholes")


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
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    # Routers have no adapter: the original does not load theirs.
    assert not [name for name in load_file(tmp_path / "kept-lora" / "adapter_model.safetensors") if ".gate." in name]
    for folder in ("kept", "kept-lora"):
        assert 'PeftModel.from_pretrained(model, "kept-lora")' in (tmp_path / folder / "README.md").read_text()
    assert "PeftModel" not in (tmp_path / "merged" / "README.md").read_text()
    assert cli.main(["convert", "export-unimoe", str(tmp_path / "merged"), "--out", str(tmp_path / "whole")]) == 0
    assert "LoRA" not in capsys.readouterr().out
    assert cli.main(["convert", "export-unimoe", str(tmp_path / "kept"), "--out", str(tmp_path / "back")]) == 0
    assert "LoRA was left in kept-lora by --keep-lora and is not in these files" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["base", "clip", "whisper"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return released(tmp_path_factory.mktemp("released"))


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


def add_tokenizer(folders: UniMoeFolders, pieces: int = 96) -> dict[str, int]:
    """Put a tokenizer and the encoders' preprocessors into released folders; returns ids of words."""
    words = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "What", "is", "this", "?"])
    }
    tokenizer = Tokenizer(models.WordLevel(words | {f"w{i}": i for i in range(9, pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folders.base)
    pictures = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "do_resize": True}
    crop = {"crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "image_mean": [0.5] * 3}
    (folders.clip / "preprocessor_config.json").write_text(json.dumps({**pictures, **crop, "image_std": [0.5] * 3}))
    if folders.whisper is not None:
        (folders.whisper / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80, "chunk_length": 1}))
    return words


@pytest.mark.parametrize("audio", AUDIOS)
def test_with_a_tokenizer_the_folder_is_complete(tmp_path: Path, audio: Any) -> None:
    folders = released(tmp_path, audio).folders
    words = add_tokenizer(folders)
    plan = plan_import(folders)
    receipt = run_import(plan, tmp_path / "out")
    assert not receipt.notes
    assert not plan.warnings

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
from unimoe.conversion.released.import_unimoe import UniMoeFolders, plan_import, run_import

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
    text = {"intermediate_size": 4096, "num_experts": 40, "num_hidden_layers": 2, "sparse_layers": [0, 1]}
    base = released(tmp_path, text=text, max_shard_bytes=32 << 20).folders.base
    sizes = [path.stat().st_size for path in base.glob("pytorch_model-*.bin")]
    assert sum(sizes) > 3 * max(sizes)
    folders = (whole.folders.base.parent, base.parent, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *map(str, folders)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    slack = 8 << 20  # allocators and file buffers; two shards at once would not fit
    assert int(done.stdout) <= 1.2 * max(sizes) + slack < 2 * max(sizes)


def test_the_folder_and_its_adapter_go_to_the_hub(
    whole: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(tmp_path / "home") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub.environment["HF_TOKEN"])
        options = ["--keep-lora", "--push-to-hub", "someone/model"]
        assert cli.main([*arguments(whole.folders, tmp_path / "out"), *options]) == 0
        sent = {name: set(files) for name, files in hub.repositories.items()}
    for name, folder in (("someone/model", "out"), ("someone/model-lora", "out-lora")):
        assert {path.name for path in (tmp_path / folder).iterdir()} <= sent[name]


def test_the_same_plan_written_twice_is_the_same(tmp_path: Path) -> None:
    plan = plan_import(released(tmp_path).folders)
    first, second = (run_import(plan, tmp_path / name, progress=False) for name in ("a", "b"))
    assert first.targets == second.targets
    assert same_tensors(tmp_path / "a", tmp_path / "b")


def test_a_sentencepiece_model_is_not_read_without_sentencepiece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match=r"needs sentencepiece and protobuf: pip install 'unimoe\[convert\]'"):
        tokenizer_files.read_tokenizer(tmp_path)


def test_the_originals_tokenizer_goes_through_both_ways(tmp_path: Path) -> None:
    folders = released(tmp_path).folders
    add_tokenizer(folders)
    for name, content in (("tokenizer.model", "the pieces"), ("special_tokens_map.json", '{"unk_token": "<unk>"}')):
        (folders.base / name).write_text(content)
    originals = {path.name: path.read_bytes() for path in folders.base.glob("*token*")}
    assert len(originals) == 4
    import_unimoe(folders, tmp_path / "out")
    lines = export_unimoe(tmp_path / "out", tmp_path / "back")
    assert {path.name: path.read_bytes() for path in (tmp_path / "back" / "base").glob("*token*")} == originals
    assert not any(line.startswith("note") for line in lines)


def test_a_model_that_lost_the_originals_tokenizer_says_so_and_takes_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = released(tmp_path).folders
    add_tokenizer(folders)
    import_unimoe(folders, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "original_tokenizer")
    export = ["convert", "export-unimoe", str(tmp_path / "out"), "--out"]
    assert cli.main([*export, str(tmp_path / "plain")]) == 0
    assert "Export again with --tokenizer BASE" in capsys.readouterr().out
    assert cli.main([*export, str(tmp_path / "no"), "--tokenizer", str(folders.base)]) == 2
    assert "tokenizer.model is missing" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    (folders.base / "tokenizer.model").write_text("the pieces")
    assert cli.main([*export, str(tmp_path / "given"), "--tokenizer", str(folders.base)]) == 0
    assert (tmp_path / "given" / "base" / "tokenizer.model").read_text() == "the pieces"


def test_the_originals_config_makes_no_noise(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = released(tmp_path, finetuned=False).folders
    add_tokenizer(folders)
    config = json.loads((folders.base / "config.json").read_text())
    fields = {"model_type": "llava", "rope_scaling": None}  # so some were released
    (folders.base / "config.json").write_text(json.dumps(config | fields))
    recwarn.clear()
    capfd.readouterr()
    plan_import(folders)
    assert not [warning for warning in recwarn if "rope_scaling" in str(warning.message)]
    assert "You are using a model of type" not in capfd.readouterr().err


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folders = released(tmp_path).folders
    add_tokenizer(folders, pieces=97)
    with pytest.raises(ConversionError, match="has 97 pieces, but the model embeds 96"):
        plan_import(folders)


def test_without_a_tokenizer_command_and_card_say_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = released(tmp_path)
    assert cli.main(arguments(source.folders, tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "no tokenizer and no processor" in shown[shown.index("Saved in") :]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoProcessor" not in card
    assert "convert again" in card
    assert "do_sample=False" in card


def test_options_without_use_are_refused_or_named(tmp_path: Path) -> None:
    source = released(tmp_path, finetuned=False)
    with pytest.raises(ConversionError, match="no file has LoRA to be kept"):
        plan_import(source.folders, keep_lora=True)
    plan = plan_import(dataclasses.replace(source.folders, beats=tmp_path / "BEATs.pt"))
    assert plan.notes[-1].startswith("--beats was not used: this is the variant speech_dp")


def test_the_q_formers_fields_may_stand_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = released(tmp_path, "beats").folders
    fields = json.dumps(json.loads(folders.qformer_config.read_text()))
    command = arguments(dataclasses.replace(folders, qformer_config=None), tmp_path / "out")
    assert cli.main([*command, "--qformer-config", fields]) == 0
    assert cli.main([*command, "--qformer-config", fields[:-1]]) == 2
    assert "is not a JSON object" in capsys.readouterr().err


def test_without_a_network_the_folder_stays_and_the_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = released(tmp_path, finetuned=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    assert cli.main([*arguments(source.folders, tmp_path / "out"), "--push-to-hub", "someone/model"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"unimoe: {tmp_path / 'out'} is complete but could not be uploaded")
    assert f"hf upload someone/model {tmp_path / 'out'}" in error
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"moe_intermediate_size": 24}, "moe_intermediate_size = 24"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"rope_theta = 500000\.0"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type = 'yarn'"),
    ],
)
def test_what_the_original_has_no_field_for_is_not_exported(
    tmp_path: Path, text: dict[str, Any], message: str
) -> None:
    parts = {"audio_config": None, "sound_connector": None}
    tiny.model({"num_hidden_layers": 1, "sparse_layers": [0], **text}, **parts).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=message):
        export_unimoe(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()
