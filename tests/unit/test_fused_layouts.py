"""Fused tensors come apart as the families that fuse them read them, whole and in pieces; misfits are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Phi3Config, Phi3ForCausalLM

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.checkpoints.checkpoint_reader import Checkpoint
from unimoe.conversion.checkpoints.tensor_parts import Part, PartsView, consecutive
from unimoe.conversion.dense.fused_layouts import AttentionSizes, internlm2_qkv, phi3_rows
from unimoe.conversion.dense.sources import load_dense, open_source
from unimoe.errors import ConversionError

SIZES = AttentionSizes(heads=6, key_value_heads=2, head_dim=4)
CONFIG: dict[str, Any] = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def internlm2_tensors(bias: bool) -> dict[str, torch.Tensor]:
    """Random weights in InternLM2's layout: 4 query heads of 8 on 2 key-value heads, and a hidden size of 32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    tensors = {
        "model.tok_embeddings.weight": normal(96, 32),
        "model.norm.weight": 1 + normal(32),
        "output.weight": normal(96, 32),
    }
    for layer in range(2):
        shapes = {
            "attention.wqkv.weight": (64, 32),
            "attention.wo.weight": (32, 32),
            "feed_forward.w1.weight": (48, 32),
            "feed_forward.w2.weight": (32, 48),
            "feed_forward.w3.weight": (48, 32),
            "attention_norm.weight": (32,),
            "ffn_norm.weight": (32,),
            **({"attention.wqkv.bias": (64,), "attention.wo.bias": (32,)} if bias else {}),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}"] = normal(*shape) + ("norm" in name)
    return tensors


def internlm2_logits(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """InternLM2 as its layout describes it: each key-value head's group of wqkv is its queries, its key, its value."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return tensors[name] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    def rotate(x_BNSD: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x_BNSD.shape[2])[:, None] / 1_000_000 ** (torch.arange(0, 8, 2) / 8)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        first, second = x_BNSD.chunk(2, -1)
        return x_BNSD * cos + torch.cat((-second, first), -1) * sin

    x = tensors["model.tok_embeddings.weight"][ids]
    batch, length = ids.shape
    for layer in range(2):
        here = {n.split(".", 3)[3]: t for n, t in tensors.items() if n.startswith(f"model.layers.{layer}.")}
        qkv = F.linear(
            norm(x, f"model.layers.{layer}.attention_norm.weight"),
            here["attention.wqkv.weight"],
            here.get("attention.wqkv.bias"),
        )
        qkv = qkv.view(batch, length, 2, 4, 8)  # key-value heads, then two queries, a key and a value each
        query = rotate(qkv[:, :, :, :2].reshape(batch, length, 4, 8).transpose(1, 2))
        key = rotate(qkv[:, :, :, 2].transpose(1, 2)).repeat_interleave(2, 1)
        value = qkv[:, :, :, 3].transpose(1, 2).repeat_interleave(2, 1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, length, 32)
        x = x + F.linear(attended, here["attention.wo.weight"], here.get("attention.wo.bias"))
        y = norm(x, f"model.layers.{layer}.ffn_norm.weight")
        gated = F.silu(y @ here["feed_forward.w1.weight"].T) * (y @ here["feed_forward.w3.weight"].T)
        x = x + gated @ here["feed_forward.w2.weight"].T
    return norm(x, "model.norm.weight") @ tensors["output.weight"].T


def internlm2_folder(folder: Path, bias: bool = False, **fields: Any) -> dict[str, torch.Tensor]:
    folder.mkdir()
    tensors = internlm2_tensors(bias)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "bias": bias, **fields}))
    return tensors


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_gives_the_logits_of_its_layout(bias: bool, tmp_path: Path) -> None:
    tensors = internlm2_folder(tmp_path / "dense", bias)
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    model = load_dense(open_source(str(tmp_path / "dense")))
    with torch.no_grad():
        assert (model(ids).logits - internlm2_logits(tensors, ids)).abs().max() <= 1e-5


def test_internlm2_becomes_sparse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = internlm2_folder(tmp_path / "dense", max_position_embeddings=64)
    assert cli.main(["convert", "upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "sparse")]) == 0
    receipt = json.loads((tmp_path / "sparse" / "receipt.json").read_text())
    assert receipt["keys_consumed"] == len(tensors)
    assert receipt["comparison"]["reference"] == "the source as our dense model"
    assert "against the source as our dense model" in capsys.readouterr().out
    ids = torch.arange(3, 30)[None]
    sparse = UniMoeForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    with torch.no_grad():
        assert (sparse(ids).logits - internlm2_logits(tensors, ids)).abs().max() <= 1e-5


def test_phi3_becomes_sparse_and_is_compared_with_transformers_own_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {
        name: value for name, value in CONFIG.items() if name.startswith(("num", "hidden", "inter", "vocab", "max"))
    }
    model = Phi3ForCausalLM(Phi3Config(**sizes, initializer_range=0.2, sliding_window=20, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert cli.main(["convert", "upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "sparse")]) == 0
    receipt = json.loads((tmp_path / "sparse" / "receipt.json").read_text())
    assert receipt["keys_consumed"] == len(model.state_dict()) == 15
    assert receipt["comparison"]["reference"] == "the source"
    sparse = UniMoeForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    assert sparse.config.text_config.sliding_window == 20
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert (sparse(ids).logits - model(ids).logits).abs().max() <= 1e-5


def phi3_qkv(stored: str, sizes: AttentionSizes) -> list[Part]:
    return consecutive(stored, phi3_rows("self_attn.qkv_proj", sizes, 0))


@pytest.mark.parametrize("make", [phi3_qkv, internlm2_qkv])
def test_a_view_reads_any_range_of_a_part(make: Any, tmp_path: Path) -> None:
    fused = torch.arange(40 * 3, dtype=torch.float32).view(40, 3)
    save_file({"fused": fused, "other": torch.zeros(2)}, tmp_path / "model.safetensors")
    parts = dict(zip("qkv", make("fused", SIZES), strict=True)) | {"whole": Part("other")}
    view = PartsView(Checkpoint(tmp_path), parts)
    assert {name: shape[0] for name, shape in view.shapes.items()} == {"q": 24, "k": 8, "v": 8, "whole": 2}
    # Together the parts are all rows, each once.
    assert torch.equal(torch.cat([view.read(n) for n in "qkv"]).sort(0).values, fused)
    for name in "qkv":
        whole = parts[name].of(fused)
        assert torch.equal(view.read(name), whole)
        for start in range(0, whole.numel(), 5):
            for count in (1, 7, 20):
                expected = whole.reshape(-1)[start : start + count]
                assert torch.equal(view.read_flat(name, start, len(expected)), expected)


def test_weights_and_configuration_that_differ_are_refused(tmp_path: Path) -> None:
    internlm2_folder(tmp_path / "dense", num_attention_heads=8, num_key_value_heads=2)
    with pytest.raises(ConversionError, match=r"wqkv.weight has shape \[64, 32\], but .* make 48 rows"):
        open_source(str(tmp_path / "dense"))
    with pytest.raises(ConversionError, match="rows up to 12"):
        Part("x", ((8, 12),)).shape((10, 4))
