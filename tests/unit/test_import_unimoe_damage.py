"""Damaged Uni-MoE folders are refused by name, and nothing is written."""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import edit_json, rewrite
from tiny_unimoe import Released, copied, released

from unimoe.conversion.released.import_unimoe import import_unimoe, plan_import
from unimoe.conversion.released.unimoe_keys import ALIGNER
from unimoe.errors import ConversionError


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _hole(path: Path) -> None:
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path.write_bytes(content)


def _base(source: Released, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(source.folders.base / "pytorch_model.bin", change)


def _e2(source: Released, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(source.folders.finetuned / name, change)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of a pickle ran')",))


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
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
    "pointers of Git LFS": (
        lambda s: (s.folders.clip / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid"),
        r"model\.safetensors is a pointer of Git LFS",
    ),
    "empty file": (lambda s: (s.folders.finetuned / "mlp_gates.bin").write_bytes(b""), r"mlp_gates\.bin is empty"),
    "no gates": (lambda s: (s.folders.finetuned / "mlp_gates.bin").unlink(), r"mlp_gates\.bin is missing"),
    "no adapter": (lambda s: (s.folders.finetuned / "adapter_model.bin").unlink(), r"adapter_model\.bin is missing"),
    "no weights": (lambda s: (s.folders.base / "pytorch_model.bin").unlink(), r"base holds no model\.safetensors"),
    "no configuration of an encoder": (
        lambda s: (s.folders.whisper / "config.json").unlink(),
        r"whisper.config\.json is missing",
    ),
    "no configuration": (lambda s: (s.folders.base / "config.json").unlink(), r"base.config\.json is missing"),
    "unknown tensor": (
        lambda s: _base(s, lambda t: t.update({"model.layers.0.extra": torch.ones(2)})),
        r"^1 unexpected tensor.*base/pytorch_model\.bin: model\.layers\.0\.extra",
    ),
    "unknown encoder tensor": (
        lambda s: edit_json(s.folders.clip / "config.json", num_hidden_layers=2),
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
    "adapter without a layer": (
        lambda s: _e2(
            s, "adapter_model.bin", lambda t: [t.pop(n) for n in list(t) if "layers.1.self_attn.q_proj" in n]
        ),
        r"adapter_model\.bin lacks LoRA of model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "gate of a layer": (
        lambda s: _e2(s, "mlp_gates.bin", lambda t: t.pop("model.layers.0.mlp.gate.weight")),
        r"mlp_gates\.bin lacks model\.layers\.0\.mlp\.gate\.weight",
    ),
    "gate under two names": (
        lambda s: _e2(
            s,
            "mlp_gates.bin",
            lambda t: t.update(
                {"base_model.model.model.layers.0.mlp.gate.weight": t["model.layers.0.mlp.gate.weight"]}
            ),
        ),
        r"mlp_gates\.bin holds model\.layers\.0\.mlp\.gate\.weight twice",
    ),
    "half a projector": (
        lambda s: _e2(
            s, "non_lora_trainables.bin", lambda t: [t.pop(n) for n in list(t) if n.endswith("mm_projector.2.bias")]
        ),
        r"non_lora_trainables\.bin lacks model\.mm_projector\.2\.bias",
    ),
    "queries": (
        lambda s: _e2(s, "mm_audio_aligner.bin", lambda t: t.pop("model.query_tokens")),
        r"mm_audio_aligner\.bin lacks model\.query_tokens",
    ),
    "hole in a download": (lambda s: _hole(s.folders.base / "pytorch_model.bin"), r"checksum of .* is wrong"),
    "values that are no numbers": (
        lambda s: _base(s, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        r"no finite numbers",
    ),
    "names that are no texts": (
        lambda s: _e2(s, "mlp_gates.bin", lambda t: t.update({1: torch.ones(2)})),
        r"named, dense",
    ),
    "sparse tensor": (
        lambda s: _base(s, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to_sparse()})),
        r"named, dense",
    ),
    "impossible configuration": (
        lambda s: edit_json(s.folders.finetuned / "config.json", hidden_size=None),
        r"config\.json describes no model .*hidden_size",
    ),
    "impossible encoder": (
        lambda s: edit_json(s.folders.clip / "config.json", hidden_size="wide"),
        r"clip.config\.json describes no model",
    ),
    "adapter of another rank": (
        lambda s: edit_json(s.folders.finetuned / "adapter_config.json", r=7),
        r"rank 7 asks for others",
    ),
    "adapter that is more than LoRA": (
        lambda s: edit_json(s.folders.finetuned / "adapter_config.json", use_dora=True),
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
    "fine-tuned on another base": (
        lambda s: _e2(s, "mlp_gates.bin", lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(4, 32)})),
        r"Layers 1 have a router but no experts.*Give the --base that belongs to --finetuned",
    ),
    "wrong shape": (
        lambda s: _base(s, lambda t: t.update({"lm_head.weight": torch.ones(95, 32)})),
        r"lm_head\.weight of shape \[95, 32\]",
    ),
    "experts of two shapes": (
        lambda s: (
            _base(s, lambda t: t.update({EXPERT: torch.ones(40, 32)})),
            _e2(s, "adapter_model.bin", lambda t: [t.pop(n) for n in list(t) if ".experts.1.up_proj." in n]),
            edit_json(s.folders.finetuned / "adapter_config.json", target_modules=["self_attn.q_proj"]),
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
        lambda s: _e2(
            s,
            "mm_audio_aligner.bin",
            lambda t: t.update({f"{ALIGNER}qformer.qformer.layernorm.weight": torch.ones(2)}),
        ),
        r"holds both",
    ),
    "configuration of another model": (
        lambda s: edit_json(s.folders.finetuned / "config.json", num_experts=5),
        r"num_experts = 5 but the tensors show 4",
    ),
    "dense configuration": (lambda s: edit_json(s.folders.finetuned / "config.json", moe=None), r"moe: null"),
    "8 experts": (lambda s: edit_json(s.folders.finetuned / "config.json", moe_type="dense"), r"8-expert variant"),
    "encoder of another kind": (
        lambda s: edit_json(s.folders.clip / "config.json", model_type="siglip"),
        r"describes a 'siglip' model",
    ),
    "pickle with code": (
        lambda s: (s.folders.base / "pytorch_model.bin").write_bytes(pickle.dumps({"x": _Code()})),
        r"cannot be read as plain tensors \(\w+\): it is damaged, or holds more than that\. Pickles",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return released(tmp_path_factory.mktemp("released"))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_and_nothing_is_written(whole: Released, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    source = dataclasses.replace(whole, folders=copied(whole.folders, tmp_path))
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
    rewrite(source.folders.beats, lambda content: content["model"].update({name: content["model"][name] + 1}))
    with pytest.raises(ConversionError, match="share one such table"):
        import_unimoe(source.folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_an_index_forgets_are_not_lost(tmp_path: Path) -> None:
    base = released(tmp_path, finetuned=False, max_shard_bytes=20_000).folders
    shard = sorted(base.base.glob("pytorch_model-*.bin"))[0]
    rewrite(shard, lambda content: content.update({"model.forgotten": torch.ones(2)}))
    with pytest.raises(ConversionError, match=r"1 unexpected tensor.*model\.forgotten"):
        plan_import(base)
