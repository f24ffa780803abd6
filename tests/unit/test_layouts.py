"""`unimoe convert layouts`: every layout loads, nothing changes on the way there and back, ranks have files of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.checkpoints.checkpoint_reader import Checkpoint
from unimoe.conversion.checkpoints.expert_shards import closed_tensors
from unimoe.conversion.checkpoints.layouts import plan_layout, run_layout
from unimoe.errors import ConversionError

TEXT: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts") / "fused"
    tiny.model(TEXT).save_pretrained(folder)
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in Checkpoint(folder).tensors
    (folder / "README.md").write_text("# A model\n")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def lay_out(source: Path, out: Path, *arguments: object) -> Path:
    assert cli.main(["convert", "layouts", str(source), "--out", str(out), *map(str, arguments)]) == 0
    return out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == other[name].dtype and torch.equal(a, other[name]) for name, a in one.items()
    )


@pytest.mark.parametrize("arguments", [["--to", "per-expert"], *(["--ep", n] for n in (1, 2, 3, 6))])
def test_there_and_back_is_bit_equal_and_every_layout_loads(
    arguments: list[object], fused: Path, tmp_path: Path
) -> None:
    apart = lay_out(fused, tmp_path / "apart", *arguments)
    names = set(Checkpoint(apart).tensors)
    assert "model.language_model.layers.0.mlp.experts.5.gate_proj.weight" in names
    assert "model.language_model.layers.0.mlp.shared_experts.gate_up_proj" in names
    assert not any(name.endswith("mlp.experts.down_proj") for name in names)
    assert (apart / "README.md").read_text() == "# A model\n"

    expected = UniMoeForCausalLM.from_pretrained(fused).eval()
    loaded, info = UniMoeForCausalLM.from_pretrained(apart, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(loaded.state_dict(), expected.state_dict())

    assert same(tensors(lay_out(apart, tmp_path / "back", "--to", "fused")), tensors(fused))


def test_layouts_of_experts_become_each_other(fused: Path, tmp_path: Path) -> None:
    two = lay_out(fused, tmp_path / "two", "--ep", 2)
    three = lay_out(two, tmp_path / "three", "--ep", 3)
    assert same(tensors(three), tensors(two))
    assert {path.name for path in three.glob("*rank*")} == {
        f"model-experts-rank-{rank:03d}-of-003-00000.safetensors" for rank in range(3)
    }


def test_models_that_were_loaded_one_by_one_are_saved_fused(fused: Path, tmp_path: Path) -> None:
    apart = lay_out(fused, tmp_path / "apart", "--to", "per-expert")
    UniMoeForCausalLM.from_pretrained(apart).save_pretrained(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(fused))
    UniMoeForCausalLM.from_pretrained(apart).save_pretrained(tmp_path / "kept", save_original_format=True)
    assert same(tensors(tmp_path / "kept"), tensors(apart))


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_reads_its_own_experts_and_what_all_share(ranks: int, fused: Path, tmp_path: Path) -> None:
    run_layout(plan_layout(fused, "per-expert", ranks), tmp_path / "ep", max_shard_bytes=20_000, progress=False)
    index = json.loads((tmp_path / "ep" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["expert_parallel_ranks"] == ranks
    inner, hidden, layers = 48, tiny.HIDDEN, 2
    for rank in range(ranks):
        files = sorted((tmp_path / "ep").glob(f"*rank-{rank:03d}-*"))
        read = [load_file(file) for file in files]
        owned = {int(name.split(".experts.")[1].split(".")[0]) for file in read for name in file}
        assert owned == set(range(rank * 6 // ranks, (rank + 1) * 6 // ranks))
        values = sum(tensor.numel() for file in read for tensor in file.values())
        assert values == len(owned) * layers * 3 * inner * hidden
        assert len(files) > 1  # and the size limit holds for them too


def test_files_open_when_a_tensor_in_them_is_asked_for(fused: Path, tmp_path: Path) -> None:
    ep = lay_out(fused, tmp_path / "ep", "--ep", 3)
    closed = closed_tensors(ep)
    name = "model.language_model.layers.0.mlp.experts.4.down_proj.weight"
    assert closed[name].get_shape() == [tiny.HIDDEN, 48]
    assert not closed[name].file.is_open
    assert torch.equal(closed[name][...], tensors(ep)[name])
    assert {tensor.file.path.name for tensor in closed.values() if tensor.file.is_open} == {
        "model-experts-rank-002-of-003-00000.safetensors"
    }
    for model in (fused, lay_out(fused, tmp_path / "apart", "--to", "per-expert")):
        with pytest.raises(ConversionError, match="convert layouts --ep N"):
            closed_tensors(model)


def test_what_cannot_be_laid_out_is_refused(fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(source: Path, *arguments: object) -> str:
        assert cli.main(["convert", "layouts", str(source), "--out", str(tmp_path / "out"), *map(str, arguments)]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "4 ranks cannot share 6 experts evenly" in refusal(fused, "--ep", 4)
    assert "0 ranks cannot share" in refusal(fused, "--ep", 0)
    tiny.model({"num_experts": 0, "sparse_layers": None}).save_pretrained(tmp_path / "dense")
    assert "holds a dense model" in refusal(tmp_path / "dense", "--to", "fused")

    apart = lay_out(fused, tmp_path / "apart", "--to", "per-expert")
    content = tensors(apart)
    gone = content.pop("model.language_model.layers.2.mlp.experts.3.up_proj.weight")
    save_file(content, apart / "model.safetensors")
    assert "lacks model.language_model.layers.2.mlp.experts.3.up_proj.weight" in refusal(apart, "--to", "fused")
    content["model.language_model.layers.2.mlp.experts.3.up_proj.weight"] = gone[:-1].clone()
    save_file(content, apart / "model.safetensors")
    assert "and its like differ" in refusal(apart, "--to", "fused")
    content["model.language_model.layers.2.mlp.experts.3.up_proj.weight"] = gone
    content["model.more"] = gone.clone()
    save_file(content, apart / "model.safetensors")
    assert "holds model.more" in refusal(apart, "--to", "fused")

    def with_turned(source: Path, ending: str) -> Path:
        content = tensors(source)
        turned = {n: t.transpose(-2, -1).contiguous() if n.endswith(ending) else t for n, t in content.items()}
        assert not same(turned, content)
        save_file(turned, source / "model.safetensors")
        return source

    # As many values in another order: what came out would load, and be nonsense.
    for ending in ("mlp.experts.gate_up_proj", "layers.1.mlp.gate_proj.weight"):
        shutil.rmtree(tmp_path / "turned", ignore_errors=True)
        shutil.copytree(fused, tmp_path / "turned")
        assert "has shape" in refusal(with_turned(tmp_path / "turned", ending), "--to", "per-expert")
    content.pop("model.more")
    save_file(content, apart / "model.safetensors")
    turned = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    for ending in turned:
        with_turned(apart, ending)
    assert "has shape" in refusal(apart, "--to", "fused")
