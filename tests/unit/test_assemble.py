"""`unimoe convert assemble`: what it writes is what assembling in memory makes, and nothing at all when it cannot."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from damage import cut, edit_json, left_behind, on_a_bad_disk, write_pickle_with_code
from safetensors.torch import load_file, save_file
from tiny_llama import dense_from, llama
from transformers import AutoModelForCausalLM

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.checkpoints.checkpoint_writer import write_checkpoint
from unimoe.conversion.checkpoints.our_folder import in_model_order
from unimoe.conversion.dense.sources import open_source
from unimoe.conversion.upcycling.assemble import plan_assembly, run_assembly
from unimoe.conversion.upcycling.sparsity import Sparsity
from unimoe.conversion.upcycling.upcycle import upcycle_model
from unimoe.errors import ConversionError
from unimoe.trainers.recipe.recipe_parts import MoeConfig
from unimoe.trainers.stages.assembly import assemble as assemble_in_memory

DENSE = {"num_experts": 0, "sparse_layers": None}
LANGUAGE = "model.language_model."


def dense(seed: int) -> UniMoeForCausalLM:
    """A multimodal dense model: 3 layers, hidden 32, FFN 48."""
    return tiny.model(DENSE, seed=seed)


def ffns(model: UniMoeForCausalLM, prefix: str) -> dict[str, torch.Tensor]:
    """The FFN weights of every layer; their names start with the prefix in place of ours."""
    state = {n.removeprefix(LANGUAGE): t for n, t in model.state_dict().items() if n.startswith(LANGUAGE)}
    return {prefix + name: tensor.clone() for name, tensor in state.items() if ".mlp." in name}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and experts in every form: folders of ours and of LLaMA's, files in all three namings."""
    folder = tmp_path_factory.mktemp("sources")
    dense(0).save_pretrained(folder / "base", max_shard_size="60KB")
    (folder / "base" / "LICENSE").write_text("Do what you want.\n")
    dense(1).save_pretrained(folder / "ours")
    llama(2).save_pretrained(folder / "llama", max_shard_size="40KB")
    save_file(ffns(dense(3), LANGUAGE), folder / "whole.safetensors")
    torch.save(ffns(dense(4), "model."), folder / "original.bin")
    save_file({n: t for n, t in ffns(dense(5), "").items() if "layers.1." not in n}, folder / "expert.safetensors")
    return folder


def expert_tensors(seed: int) -> dict[str, torch.Tensor]:
    """What `upcycle_model` takes as one of expert_ffns, for the source that was made with this seed."""
    return ffns(dense_from(llama(2)) if seed == 2 else dense(seed), "")


FOUR = [("vision", "ours"), ("speech", "llama"), ("sound", "whole.safetensors"), ("text", "original.bin")]
EIGHT = [*FOUR, ("more", "expert.safetensors"), ("sound", "whole.safetensors"), ("base", "base"), ("vision", "ours")]


def options(sources: Path, experts: list[tuple[str, str]]) -> list[str]:
    return [part for name, file in experts for part in ("--expert", f"{name}={sources / file}")]


def run_cli(sources: Path, out: Path, experts: list[tuple[str, str]], *more: object) -> int:
    given = ["--base", str(sources / "base"), "--out", str(out), *options(sources, experts)]
    return cli.main(["convert", "assemble", *given, *map(str, more)])


@pytest.mark.parametrize(
    ("experts", "seeds", "router"),
    [(FOUR, [1, 2, 3, 4], "normal"), (EIGHT, [1, 2, 3, 4, 5, 3, 0, 1], "zeros")],
    ids=["4 experts", "8 experts, some twice"],
)
def test_the_result_is_the_assembly_in_memory(
    sources: Path, tmp_path: Path, experts: list[tuple[str, str]], seeds: list[int], router: Any
) -> None:
    out = tmp_path / "sparse"
    assert run_cli(sources, out, experts, "--layers", "even", "--router-init", router, "--seed", 3) == 0
    expected = upcycle_model(
        dense(0),
        Sparsity(
            num_experts=len(experts),
            num_experts_per_tok=2,
            sparse_layers=[0, 2],
            router_init=router,
            seed=3,
        ),
        expert_ffns=[expert_tensors(seed) for seed in seeds],
    ).state_dict()
    written = UniMoeForCausalLM.from_pretrained(out).eval()
    assert written.state_dict().keys() == expected.keys()
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert {p.name for p in out.iterdir()} >= {"config.json", "modeling_unimoe.py", "README.md", "LICENSE"}
    ids = torch.tensor([[1, 5, 7]])
    assert AutoModelForCausalLM.from_pretrained(out).generate(ids, max_new_tokens=2).shape[1] <= 5


def test_the_routing_may_be_dynamic(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"router_type": "dynamic", "router_top_p": 0.7, "num_null_experts": 1}
    assert run_cli(sources, tmp_path / "out", FOUR, "--routing", json.dumps(fields)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert config.items() >= fields.items()
    capsys.readouterr()
    for routing, said in (
        ('{"router_typo": 1}', "--routing names ['router_typo']; it may set"),
        ('{"router_type": "dynamc"}', "'router_type' expected one of ('top_k', 'dynamic'), got dynamc"),
        ("{", "is not a JSON object"),
        ("none.json", "--routing 'none.json' is neither a JSON object"),
    ):
        assert run_cli(sources, tmp_path / "no", FOUR, "--routing", routing) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_one_expert_names_the_option_that_does_not_fit(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(sources, tmp_path / "no", FOUR[:1]) == 2
    assert "A token cannot use 2 of 1 expert: give more, or set --top-k" in capsys.readouterr().err


def test_it_does_what_a_curriculum_does(sources: Path, tmp_path: Path) -> None:
    folders = []
    for seed in (5, 6):
        folders.append(tmp_path / f"run-{seed}")
        folders[-1].mkdir()
        save_file(ffns(dense(seed), ""), folders[-1] / "expert.safetensors")
        save_file({}, folders[-1] / "connectors.safetensors")
    moe = MoeConfig(sparse_layers=[1], router_init="normal")
    expected = assemble_in_memory(dense(0), moe, folders, seed=7).state_dict()
    files = [(folder.name, folder / "expert.safetensors") for folder in folders]
    plan = plan_assembly(open_source(str(sources / "base")), files, sparse_layers=[1], seed=7)
    run_assembly(plan, tmp_path / "sparse", progress=False, max_shard_bytes=60_000)
    assert len(list((tmp_path / "sparse").glob("model-*.safetensors"))) > 2
    written = UniMoeForCausalLM.from_pretrained(tmp_path / "sparse").state_dict()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, written[name])] == []


def test_the_receipt_accounts_for_every_tensor(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sparse"
    assert run_cli(sources, out, EIGHT, "--layers", "0,2") == 0
    receipt, printed = json.loads((out / "receipt.json").read_text()), capsys.readouterr().out
    tensors = load_file(out / "model.safetensors")
    assert receipt["targets"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        target = receipt["targets"][name]
        assert target["shape"] == list(tensor.shape)
        assert target["sha256"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest(), name
    mlp = f"{LANGUAGE}layers.2.mlp."
    assert receipt["targets"][mlp + "experts.down_proj"]["made_of"][3:6] == [
        "expert 3 (text): model.layers.2.mlp.down_proj.weight",
        "expert 4 (more): layers.2.mlp.down_proj.weight",
        f"expert 5 (sound): {mlp}down_proj.weight",
    ]
    gate_up = receipt["targets"][mlp + "experts.gate_up_proj"]["made_of"]
    assert [entry.rpartition(".mlp.")[2] for entry in gate_up] == ["gate_proj.weight", "up_proj.weight"] * 8
    assert receipt["targets"][mlp + "gate.weight"]["made_of"] == ["router rows: drawn, seed 0"]

    left = {source["name"]: set(source["dropped"].values()) for source in receipt["sources"][1:]}
    other = "no FFN: the base's is taken, WHICH HAS OTHER VALUES"
    assert left["base"] == {"no FFN: the base's is taken, which is the same", "an FFN whose layer stays dense"}
    assert other in left["ours"]
    assert other in printed
    by_name = {source["name"]: source for source in receipt["sources"] if source["role"] == "expert"}
    assert {name: source["experts"] for name, source in by_name.items()} == {
        "ours": [0, 7],
        "llama": [1],
        "whole.safetensors": [2, 5],
        "original.bin": [3],
        "expert.safetensors": [4],
        "base": [6],
    }
    digest = hashlib.sha256((sources / "original.bin").read_bytes()).hexdigest()
    assert by_name["original.bin"]["files"] == {"original.bin": digest}
    assert len(by_name["llama"]["files"]) > 1
    assert by_name["original.bin"]["consumed"] == 6
    assert set(by_name["original.bin"]["dropped"].values()) == {"an FFN whose layer stays dense"}
    base = receipt["sources"][0]
    assert base["consumed"] + len(base["dropped"]) == len(open_source(str(sources / "base")).checkpoint.tensors)
    parameters = sum(p.numel() for p in UniMoeForCausalLM.from_pretrained(out).parameters())
    assert receipt["parameters_after"] == parameters
    assert receipt["parameters_active"] == parameters - 2 * 6 * 3 * 32 * 48
    assert receipt["tensors_read_back"] == len(tensors)
    assert digest[:16] in printed
    assert "expert      whole.safetensors (experts [2, 5]): 6 tensors taken" in printed
    assert str(tmp_path) not in (out / "receipt.json").read_text() + (out / "README.md").read_text()


def test_another_dtype_is_converted_and_noted(sources: Path, tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in ffns(dense(1), "").items()}, tmp_path / "half.safetensors")
    files = [("half", tmp_path / "half.safetensors"), ("full", sources / "whole.safetensors")]
    plan = plan_assembly(
        open_source(str(sources / "base")), files, sparse_layers=[0], router_init="zeros", dtype=torch.bfloat16
    )
    receipt = run_assembly(plan, tmp_path / "sparse", progress=False)
    assert receipt.notes == [
        "half.safetensors holds float16, written as bfloat16",
        "whole.safetensors holds float32, written as bfloat16",
    ]
    tensors = load_file(tmp_path / "sparse" / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    expected = ffns(dense(1), "")["layers.0.mlp.down_proj.weight"].half().bfloat16()
    assert torch.equal(tensors[f"{LANGUAGE}layers.0.mlp.experts.down_proj"][0], expected)


def edited(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Path]:
    """A file with the FFNs of the original's naming, changed."""

    def make(folder: Path) -> Path:
        tensors = ffns(dense(1), "model.")
        change(tensors)
        save_file(tensors, folder / "bad.safetensors")
        return folder / "bad.safetensors"

    return make


def model_folder(model: Callable[[], Any], **edits: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model().save_pretrained(folder / "bad")
        edit_json(folder / "bad" / "config.json", **edits)
        return folder / "bad"

    return make


def truncated(folder: Path) -> Path:
    path = edited(lambda tensors: None)(folder)
    cut(path, 100)
    return path


def pickle_with_code(folder: Path) -> Path:
    return write_pickle_with_code(folder / "bad.bin", KEY)


def text_file(folder: Path) -> Path:
    (folder / "bad.txt").write_text("weights")
    return folder / "bad.txt"


KEY = "model.layers.0.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "layer missing": (edited(lambda t: t.pop(KEY)), f"bad.safetensors lacks {KEY}"),
    "wrong shape": (
        edited(lambda t: t.update({KEY: torch.ones(40, 32)})),
        f"{KEY} of bad.safetensors has shape [40, 32]",
    ),
    "transposed": (edited(lambda t: t.update({KEY: torch.ones(32, 48)})), "the base needs [48, 32]"),
    "shape in a dense layer": (
        edited(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(1, 1)})),
        "model.layers.1.mlp.up_proj.weight of bad.safetensors has shape [1, 1]",
    ),
    "whole numbers": (edited(lambda t: t.update({KEY: torch.ones(48, 32, dtype=torch.int8)})), "stored as torch.int8"),
    "no FFN": (
        edited(lambda t: t.update({"model.norm.weight": torch.ones(32)})),
        "holds model.norm.weight, which is no",
    ),
    "other projection": (
        edited(lambda t: t.update({"layers.0.mlp.o_proj.weight": torch.ones(2)})),
        "holds layers.0.mlp.o_proj.weight, which is no FFN weight",
    ),
    "bias": (edited(lambda t: t.update({KEY.replace("weight", "bias"): torch.ones(48)})), "up_proj.bias, which is no"),
    "low-rank pair": (
        edited(lambda t: t.update({"model.layers.0.mlp.up_proj_lora_A.weight": torch.ones(2, 32)})),
        "up_proj_lora_A.weight, which is no FFN weight",
    ),
    "twice": (
        edited(lambda t: t.update({KEY.removeprefix("model."): torch.ones(48, 32)})),
        "holds the same weight twice",
    ),
    "too many layers": (
        edited(lambda t: t.update({KEY.replace("0", "3"): torch.ones(48, 32)})),
        "layers.3.mlp.up_proj.weight, but the base's layers are 0 to 2",
    ),
    "truncated": (truncated, "truncated or damaged"),
    "pickle with code": (pickle_with_code, "Pickles that hold code are never run"),
    "no such file": (lambda folder: folder / "bad.safetensors", "bad.safetensors is missing"),
    "no such folder": (lambda folder: folder / "bad", "is no folder"),
    "some other file": (text_file, "neither a model folder nor a .safetensors or .bin file"),
    "other width": (model_folder(lambda: llama(1, intermediate_size=64)), "intermediate_size 64 but the base has 48"),
    "other depth": (model_folder(lambda: llama(1, num_hidden_layers=2)), "num_hidden_layers 2 but the base has 3"),
    "other activation": (
        model_folder(lambda: llama(1), hidden_act="gelu"),
        "hidden_act 'gelu' but the base has 'silu'",
    ),
    "sparse": (model_folder(tiny.model), "is sparse already (layers [0, 2])"),
    "other family": (model_folder(lambda: llama(1), model_type="gemma"), "norms add one"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_sources_that_do_not_fit_are_refused_by_name(
    name: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = DAMAGES[name]
    (tmp_path / "given").mkdir()
    bad = make(tmp_path / "given")
    experts = [("good", "ours"), ("damaged", str(bad))]
    assert run_cli(sources, tmp_path / "sparse", experts, "--layers", "even") == 2
    said = capsys.readouterr().err
    assert message in said
    assert "'damaged'" in said or "bad" in said
    assert left_behind(tmp_path) == ["given"]
    assert not (tmp_path / "given" / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expert", "nameless"], "--expert is 'nameless'; write NAME=SOURCE"),
        (["--expert", "=x"], "write NAME=SOURCE"),
        (["--expert", "x="], "write NAME=SOURCE"),
        (["--layers", "3"], "layers are 0 to 2"),
        (["--layers", "1"], "expert.safetensors lacks model.layers.1.mlp.gate_proj.weight, which layer 1 needs"),
        (["--top-k", "3"], "num_experts_per_tok"),
        (["--expert", "first=original.bin"], "'first' stands for two sources"),
    ],
)
def test_impossible_options_are_refused(
    arguments: list[str], message: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [("first", "expert.safetensors"), ("second", "ours")]
    arguments = [a.replace("original.bin", str(sources / "original.bin")) for a in arguments]
    assert run_cli(sources, tmp_path / "sparse", experts, "--layers", "0,2", *arguments) == 2
    assert message in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_bases_and_results_are_protected(sources: Path, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "base")
    with pytest.raises(ConversionError, match="already has 4 experts"):
        plan_assembly(open_source(str(tmp_path / "base")), [("a", sources / "ours")] * 2, sparse_layers=[0])
    with pytest.raises(ConversionError, match="There are no experts"):
        plan_assembly(open_source(str(sources / "base")), [], sparse_layers=[0])
    assert run_cli(sources, tmp_path, FOUR, "--layers", "even") == 2
    assert left_behind(tmp_path) == ["base"]


def test_a_disk_that_writes_something_else_is_noticed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimoe.conversion.checkpoints.read_back.write_checkpoint", on_a_bad_disk(write_checkpoint))
    plan = plan_assembly(open_source(str(sources / "base")), [("a", sources / "ours")] * 2, sparse_layers=[0])
    with pytest.raises(ConversionError, match="reads back differently"):
        run_assembly(plan, tmp_path / "sparse", progress=False)
    assert left_behind(tmp_path) == []


def test_a_wrong_order_of_experts_would_be_noticed(sources: Path) -> None:
    plan = plan_assembly(
        open_source(str(sources / "base")), [(n, sources / f) for n, f in FOUR], sparse_layers=[0], router_init="zeros"
    )
    down = next(o for o in plan.outputs if o.name.endswith("experts.down_proj"))
    pieces = [make() for make in down.pieces]
    for index, seed in enumerate((1, 2, 3, 4)):
        assert torch.equal(pieces[index], expert_tensors(seed)["layers.0.mlp.down_proj.weight"])
    assert in_model_order(list(plan.outputs)[::-1], plan.config) == plan.outputs


@pytest.mark.parametrize("seed", [str(10**30), "-1", "x"])
def test_seeds_that_no_generator_takes_are_refused(capsys: pytest.CaptureFixture[str], seed: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "assemble", "--seed", seed])
    assert "is no whole number from 0 to 4294967295" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "assemble", "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert printed.count("unimoe convert assemble --base") == 3
    assert "--expert base7=mlp_base7.bin" in printed
