"""`unimoe convert upcycle`: complete folders with a receipt, and nothing at all when something is wrong."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from damage import cut, edit_json, left_behind, on_a_bad_disk, write_pickle_with_code
from tiny_llama import SIZES, dense_from, llama
from tiny_tokenizer import save_word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from unimoe import UniMoeForCausalLM, cli
from unimoe.commands._convert_options import parse_layers
from unimoe.conversion.checkpoints.checkpoint_writer import write_checkpoint
from unimoe.conversion.dense.sources import open_source
from unimoe.conversion.upcycling import stream_upcycle
from unimoe.conversion.upcycling.group_options import parse_groups
from unimoe.conversion.upcycling.sparsity import Sparsity
from unimoe.conversion.upcycling.stream_upcycle import plan_upcycle, run_upcycle
from unimoe.conversion.upcycling.upcycle import upcycle_model
from unimoe.errors import ConversionError

SPARSITY = Sparsity(num_experts=4, num_experts_per_tok=2, sparse_layers=(0, 2))
GROUPS = json.dumps(
    {
        "vision": {"experts": [0, 1, 2], "modalities": ["image", "video"]},
        "language": {"experts": [1, 2, 3], "modalities": ["text", "speech", "sound"]},
    }
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama in several shards, with tokenizer, model card and licence."""
    folder = tmp_path / "dense-llama"
    llama().save_pretrained(folder, max_shard_size="40KB")
    save_word_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "LICENSE").write_text("Do what you want.\n")
    return folder


def phi3(**fields: Any) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**{**SIZES, "pad_token_id": 0, **fields})).eval()


def run_cli(*arguments: object) -> int:
    return cli.main(["convert", "upcycle", *map(str, arguments)])


def test_command_writes_what_upcycling_in_memory_makes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sparse"
    assert run_cli(source, "--out", out, "--layers", "even", "--groups", GROUPS, "--seed", 3) == 0

    expected = upcycle_model(
        dense_from(llama()),
        Sparsity(
            num_experts=4,
            num_experts_per_tok=2,
            sparse_layers=[0, 2],
            expert_groups={"vision": [0, 1, 2], "language": [1, 2, 3]},
            modality_groups=dict.fromkeys(("image", "video"), "vision") | dict.fromkeys(("text", "speech", "sound"), "language"),
            seed=3,
        ),
    )  # fmt: skip
    written = UniMoeForCausalLM.from_pretrained(out)
    assert written.config.text_config.to_dict().items() >= {"sparse_layers": [0, 2], "num_experts": 4}.items()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(written.state_dict()[name], tensor), name

    printed = capsys.readouterr().out
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["comparison"]["max_abs_logit_difference"] <= 1e-5
    assert receipt["comparison"]["each_expert_difference"] <= 1e-5
    assert all(one["equal"] for one in receipt["comparison"]["continuations"])
    assert receipt["keys_consumed"] == 30
    assert receipt["parameters_after"] == sum(p.numel() for p in expected.parameters())
    assert receipt["parameters_active"] == receipt["parameters_after"] - 2 * 2 * 3 * 32 * 48
    assert "group       vision: image, video -> [0, 1, 2]" in printed
    assert "max |Δlogit|" in printed


def test_the_routing_may_be_dynamic(source: Path, tmp_path: Path) -> None:
    fields = {"router_type": "dynamic", "router_top_p": 0.7}
    (tmp_path / "routing.json").write_text(json.dumps(fields))
    assert run_cli(source, "--out", tmp_path / "out", "--routing", tmp_path / "routing.json") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert config.items() >= fields.items()


def test_result_is_a_complete_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    assert run_cli(source, "--out", out) == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE"}
    assert names >= {"modeling_unimoe.py", "routing_unimoe.py", "processing_unimoe.py", "tokenizer.json"}
    card = (out / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert str(tmp_path) not in card + (out / "receipt.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer("The capital of", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_output_is_sharded_with_a_plain_index(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    run_upcycle(plan_upcycle(open_source(str(source)), SPARSITY), out, max_shard_bytes=60_000, progress=False)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert all((out / shard).is_file() for shard in shards)
    assert UniMoeForCausalLM.from_pretrained(out).config.text_config.num_experts == 4


def test_dense_multimodal_model_of_ours(tmp_path: Path) -> None:
    dense = tiny.model({"num_experts": 0, "sparse_layers": None, "tie_word_embeddings": True})
    dense.generation_config.suppress_tokens = [tiny.IMAGE, tiny.SOUND]
    dense.save_pretrained(tmp_path / "dense")
    assert run_cli(tmp_path / "dense", "--out", tmp_path / "sparse", "--layers", "0,2", "--groups", GROUPS) == 0
    sparse = UniMoeForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    assert sparse.generation_config.suppress_tokens == [tiny.IMAGE, tiny.SOUND]
    inputs = {"input_ids": torch.tensor([tiny.prompt(1, "image", 7, "audio", 9)]), **tiny.media(images=1, windows=1)}
    with torch.no_grad():
        assert (dense(**inputs).logits - sparse(**inputs).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "dtype", "rounding"), [("bf16", torch.bfloat16, 1e-3), ("fp16", torch.float16, 1e-4)]
)
def test_small_dtypes_are_compared_on_equally_rounded_weights(
    source: Path, tmp_path: Path, name: str, dtype: torch.dtype, rounding: float
) -> None:
    assert run_cli(source, "--out", tmp_path / "sparse", "--dtype", name) == 0
    comparison = json.loads((tmp_path / "sparse" / "receipt.json").read_text())["comparison"]
    assert comparison["max_abs_logit_difference"] <= 1e-5
    assert comparison["rounding_difference"] > rounding
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_tied_head_that_is_stored_is_dropped_with_the_reason(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    folder = tmp_path / "tied"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    receipt = run_upcycle(plan_upcycle(open_source(str(folder)), SPARSITY), tmp_path / "sparse", progress=False)
    assert receipt.keys_dropped == {"lm_head.weight": "equal to the embeddings, which it is tied to"}
    assert receipt.keys_consumed == 29


def test_without_running_the_models_the_tensors_are_read_back(source: Path, tmp_path: Path) -> None:
    plan = plan_upcycle(open_source(str(source)), SPARSITY, torch.bfloat16)
    receipt = run_upcycle(plan, tmp_path / "sparse", compare=False, progress=False)
    assert receipt.tensors_read_back == len(plan.outputs) == 30
    assert "30 tensors read back" in receipt.lines()[-2]
    assert receipt.lines()[-1].startswith("not run ")


def test_a_disk_that_writes_something_else_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimoe.conversion.checkpoints.read_back.write_checkpoint", on_a_bad_disk(write_checkpoint))
    plan = plan_upcycle(open_source(str(source)), SPARSITY)
    with pytest.raises(ConversionError, match="reads back differently"):
        run_upcycle(plan, tmp_path / "sparse", compare=False, progress=False)
    assert left_behind(tmp_path, "dense-llama") == []


def test_a_wrong_conversion_is_refused_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stream_upcycle, "FFN_PROJECTIONS", ("up_proj", "gate_proj", "down_proj"))
    original = stream_upcycle._sparse_layer

    def swapped(*arguments: Any) -> Any:
        outputs = original(*arguments)
        gate_up = outputs[1]
        outputs[1] = type(gate_up)(gate_up.name, gate_up.dtype, gate_up.shape, gate_up.pieces[::-1])
        return outputs

    monkeypatch.setattr(stream_upcycle, "_sparse_layer", swapped)
    assert run_cli(source, "--out", tmp_path / "sparse") == 2
    assert "logits differ from the source's by up to" in capsys.readouterr().err
    assert left_behind(tmp_path, "dense-llama") == []


def _damage_index(folder: Path, name: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))


def _pickle_with_code(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_pickle_with_code(folder / "pytorch_model.bin", "model.norm.weight")


def _old_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": [1.0]}))


def _keep_12_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:12])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


SHARD = "model-00002-of-"
DAMAGES = {
    "traversal": (lambda f: _damage_index(f, "../../etc/passwd"), "only plain names"),
    "absolute": (lambda f: _damage_index(f, "/etc/passwd"), "only plain names"),
    "backslash": (lambda f: _damage_index(f, "..\\x.safetensors"), "only plain names"),
    "number": (lambda f: _damage_index(f, 7), "only plain names"),  # type: ignore[arg-type]
    "missing shard": (lambda f: next(f.glob(SHARD + "*")).unlink(), SHARD),
    "truncated shard": (lambda f: cut(next(f.glob(SHARD + "*")), 100), "it is truncated or damaged"),
    "cut in the header": (lambda f: _keep_12_bytes(next(f.glob(SHARD + "*"))), SHARD),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "holds no model.safetensors"),
    "pickle with code": (_pickle_with_code, "Pickles that hold code are never run"),
    "old pickle": (_old_pickle, "cannot be read as plain tensors"),
    "grown shard": (lambda f: _grow(next(f.glob(SHARD + "*"))), "truncated or damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config disagrees": (lambda f: edit_json(f / "config.json", intermediate_size=64), "has shape [48, 32]"),
    "other arithmetic": (lambda f: edit_json(f / "config.json", model_type="gemma"), "norms add one"),
    "code of its own": (
        lambda f: edit_json(f / "config.json", model_type="brand-new"),
        "cannot read the configuration",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_hostile_sources_are_refused_by_name(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGES[name]
    damage(source)
    assert run_cli(source, "--out", tmp_path / "sparse") == 2
    assert message in capsys.readouterr().err
    assert left_behind(tmp_path, "dense-llama") == []
    assert not (source / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "3"], "layers are 0 to 2"),
        (["--layers", "first"], "use odd, even, all"),
        (["--top-k", "5"], "num_experts_per_tok"),
        (["--groups", "{"], "not JSON"),
        (["--groups", '{"a": {"experts": [0]}}'], "needs a list 'modalities'"),
        (["--groups", "/no/such/file"], "neither JSON nor a file"),
        (["--groups", '{"a": {"experts": [0, 1, 2, 9], "modalities": ["text"]}}'], "expert_groups"),
    ],
)
def test_impossible_options_are_refused(
    arguments: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(source, "--out", tmp_path / "sparse", *arguments) == 2
    assert message in capsys.readouterr().err
    assert left_behind(tmp_path, "dense-llama") == []


def test_existing_results_are_not_overwritten(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "precious").write_text("x")
    assert run_cli(source, "--out", tmp_path / "sparse") == 2
    assert "is not empty" in capsys.readouterr().err
    assert left_behind(tmp_path / "sparse") == ["precious"]


def test_a_sparse_source_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "sparse")
    with pytest.raises(ConversionError, match="already has 4 experts"):
        plan_upcycle(open_source(str(tmp_path / "sparse")), SPARSITY)
    with pytest.raises(ConversionError, match="is no folder"):
        open_source(str(tmp_path / "nothing"))


def test_layers_and_groups_are_parsed(tmp_path: Path) -> None:
    assert parse_layers("odd", 5) == (1, 3)
    assert parse_layers("even", 5) == (0, 2, 4)
    assert parse_layers("all", 2) == (0, 1)
    assert parse_layers("3, 1", 5) == (1, 3)
    (tmp_path / "groups.json").write_text(GROUPS)
    assert parse_groups(str(tmp_path / "groups.json"), 4) == parse_groups(GROUPS, 4)
    assert parse_groups("moiie", 4)[0] == parse_groups(GROUPS, 4)[0]
    assert parse_groups(None, 4) == (None, None)


_MEASURE = """
import json, sys, torch
from pathlib import Path
from unimoe.conversion.dense.sources import open_source
from unimoe.conversion.upcycling.stream_upcycle import plan_upcycle, run_upcycle
from unimoe.conversion.upcycling.sparsity import Sparsity

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def convert(source, out):
    sparsity = Sparsity(num_experts=4, num_experts_per_tok=2, sparse_layers=(0, 1, 2, 3), **json.loads(sys.argv[5]))
    plan = plan_upcycle(open_source(source), sparsity, torch.bfloat16)
    run_upcycle(plan, Path(out), compare=False, allow_gap=float("inf"), progress=False)

convert(sys.argv[1], sys.argv[2])  # imports and warms up all that is used
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
convert(sys.argv[3], sys.argv[4])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", {}), ("phi-3", {"granularity": 2, "drop_ratio": 0.5, "noise": 0.1})],
    ids=["copies of llama", "drawn parts of phi-3"],
)
def test_memory_stays_below_the_largest_shard(family: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    make = llama if family == "llama" else phi3
    make(num_hidden_layers=4).save_pretrained(tmp_path / "tiny")
    # The embeddings are the largest tensor, as in most models, and fill most of a shard.
    model = make(
        vocab_size=12_000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8
    )
    model.save_pretrained(tmp_path / "dense", max_shard_size="80MB")
    shards = [path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors")]
    assert len(shards) >= 2
    folders = [tmp_path / name for name in ("tiny", "tiny-out", "dense", "dense-out")]
    command = [sys.executable, "-c", _MEASURE, *folders, json.dumps(recipe)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(result.stdout) <= 1.2 * max(shards)


def test_progress_shows_bytes_and_their_rate(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(source, "--out", tmp_path / "sparse") == 0
    last = capsys.readouterr().err.rsplit("Writing:", 1)[1]
    assert re.search(r"100%.*\d[kM]B?/\d.*B/s", last), last
