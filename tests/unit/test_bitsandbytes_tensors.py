"""Checkpoints that bitsandbytes made smaller are read as what they stand for, and converted; others are refused by name."""

import json
from pathlib import Path
from typing import Any

import moai_shapes
import pytest
import torch
from moai_shapes import TINY_CONFIG
from safetensors.torch import load_file, save_file

from unimoe.conversion.checkpoints import bitsandbytes_tensors
from unimoe.conversion.checkpoints.checkpoint_reader import Checkpoint
from unimoe.conversion.dense.sources import open_source
from unimoe.conversion.released.import_moai import import_moai, plan_moai
from unimoe.errors import ConversionError

SMALL = "model.layers.0.attention.wo.Plora_A.weight"
# The levels of NF4 (arXiv 2305.14314, appendix E) and of FP4, as bitsandbytes' page on 4 bits gives them.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)


def state(shape: tuple[int, ...], dtype: str = "float16", block: int = 64, **nested: Any) -> torch.Tensor:
    values = {"quant_type": "nf4", "blocksize": block, "dtype": dtype, "shape": shape, **nested}
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def in_4_bits(name: str, shape: tuple[int, ...], nested: bool, seed: int = 0) -> tuple[dict[str, Any], torch.Tensor]:
    """A weight as bitsandbytes stores it, written down value by value, and what it stands for."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    index = torch.randint(0, 16, (count,), generator=generator)
    blocks = -(-count // 64)
    absmax = torch.rand(blocks, generator=generator) + 0.1
    stored: dict[str, Any] = {
        name: (index[0::2] * 16 + index[1::2]).to(torch.uint8)[:, None],
        f"{name}.quant_map": NF4,
        f"{name}.absmax": absmax,
        f"{name}.quant_state.bitsandbytes__nf4": state(shape),
    }
    if nested:
        levels = torch.linspace(-1, 1, 256)
        held = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        outer = torch.rand(-(-blocks // 4), generator=generator) / 2
        absmax = torch.tensor([float(levels[h]) * float(outer[i // 4]) + 0.75 for i, h in enumerate(held.tolist())])
        extra = {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.75}
        stored |= {
            f"{name}.absmax": held,
            f"{name}.nested_absmax": outer,
            f"{name}.nested_quant_map": levels,
            f"{name}.quant_state.bitsandbytes__nf4": state(shape, **extra),
        }
    values = [float(NF4[i]) * float(absmax[n // 64]) for n, i in enumerate(index.tolist())]
    return stored, torch.tensor(values).view(shape)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("chunk", [1 << 22, 37])
def test_four_bits_stand_for_levels_times_the_blocks_largest(
    tmp_path: Path, nested: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitsandbytes_tensors, "_CHUNK", chunk)
    tensors, expected = in_4_bits("x.weight", (12, 50), nested)
    checkpoint = Checkpoint(write(tmp_path, tensors | {"x.bias": torch.ones(12)}))
    assert checkpoint.shapes == {"x.weight": (12, 50), "x.bias": (12,)}
    assert checkpoint.tensors["x.weight"].dtype == torch.float16
    torch.testing.assert_close(checkpoint.read("x.weight").float(), expected, rtol=1e-3, atol=1e-6)
    whole = checkpoint.read("x.weight").flatten()
    for start, count in ((0, 1), (1, 7), (63, 2), (127, 300), (599, 1)):
        assert torch.equal(checkpoint.read_flat("x.weight", start, count), whole[start : start + count])


def test_eight_bits_are_steps_of_their_row(tmp_path: Path) -> None:
    tensors = {
        "x.weight": torch.randint(-127, 128, (6, 10), dtype=torch.int8),
        "x.SCB": torch.rand(6) + 0.5,
        "x.weight_format": torch.tensor(0, dtype=torch.uint8),
        "y.weight": torch.ones(4, dtype=torch.bfloat16),
    }
    checkpoint = Checkpoint(write(tmp_path, tensors))
    expected = (tensors["x.weight"].float() * tensors["x.SCB"][:, None] / 127).bfloat16()
    torch.testing.assert_close(checkpoint.read("x.weight"), expected)
    assert torch.equal(checkpoint.read_flat("x.weight", 7, 20), checkpoint.read("x.weight").flatten()[7:27])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_it_is_what_bitsandbytes_brings_back(tmp_path: Path, kind: str, nested: bool, storage: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed")
    torch.manual_seed(0)
    weight = torch.randn(96, 700, dtype=torch.float16)
    packed, how = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    beside = {f"x.weight.{name}": tensor for name, tensor in how.as_dict(packed=True).items()}
    checkpoint = Checkpoint(write(tmp_path, {"x.weight": packed, **beside}))
    expected = bnb.functional.dequantize_4bit(packed, how)
    torch.testing.assert_close(checkpoint.read("x.weight"), expected, rtol=1e-3, atol=1e-6)
    piece = checkpoint.read_flat("x.weight", 1001, 5000)
    assert torch.equal(piece, checkpoint.read("x.weight").flatten()[1001:6001])


def test_eight_bits_are_what_bitsandbytes_brings_back(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed")
    weight = torch.randn(32, 48, dtype=torch.float16)
    held, scale, _ = bnb.functional.int8_vectorwise_quant(weight)
    checkpoint = Checkpoint(write(tmp_path, {"x.weight": held, "x.SCB": scale}))
    expected = bnb.functional.int8_vectorwise_dequant(held, scale).half()
    torch.testing.assert_close(checkpoint.read("x.weight"), expected, rtol=1e-3, atol=1e-6)


def test_a_moai_in_four_bits_is_converted_and_the_receipt_says_so(tmp_path: Path) -> None:
    plain = moai_shapes.tiny_tensors(torch.float16)
    tensors, expected = in_4_bits(SMALL, tuple(plain[SMALL].shape), nested=True)
    original = moai_shapes.write(tmp_path / "original", plain | tensors, TINY_CONFIG)
    receipt = import_moai(str(original), tmp_path / "out")
    assert "1 weights of the checkpoint were held in nf4 by bitsandbytes" in "; ".join(receipt.notes)
    record = next(r for records in receipt.sources.values() for name, r in records.items() if name == SMALL)
    assert (record.shape, record.dtype, record.fate) == (list(expected.shape), "float16", "consumed")
    written = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(written[record.note].float(), expected, rtol=1e-3, atol=1e-6)


def test_what_transformers_saved_in_few_bits_is_a_dense_source(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).half().save_pretrained(tmp_path / "full")
    for how in ({"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}):
        folder = tmp_path / next(iter(how))
        small = AutoModelForCausalLM.from_pretrained(
            tmp_path / "full", quantization_config=BitsAndBytesConfig(**how), dtype=torch.float16
        )
        small.save_pretrained(folder)
        source = open_source(str(folder))
        read = {name: source.checkpoint.read(key) for name, key in source.keys.items()}
        full = Checkpoint(tmp_path / "full")
        assert {name: t.shape for name, t in read.items()} == {
            name: full.tensors[key].shape for name, key in source.keys.items()
        }
        off = [(read[name] - full.read(key)).abs().max() for name, key in source.keys.items()]
        assert 0 < max(off) < (0.02 if "load_in_4bit" in how else 0.002)
        assert getattr(source.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("model.layers.0.x.qweight", "AWQ or GPTQ"),
        ("model.layers.0.x.g_idx", "GPTQ"),
        ("model.layers.0.x.weight_packed", "compressed-tensors"),
        ("model.layers.0.x.weight_scale_inv", "FP8 in blocks"),
        ("model.layers.0.x._weight_qdata", "torchao"),
        ("model.layers.0.x.W_q", "HQQ"),
        ("model.layers.0.x.weight.absmax", "bitsandbytes, without its quant_state"),
        ("model.layers.0.x.SCB", "bitsandbytes, without its int8 weight"),
    ],
)
def test_other_quantisation_is_refused_by_name(tmp_path: Path, name: str, by: str) -> None:
    tensors = moai_shapes.tiny_tensors() | {name: torch.ones(2)}
    folder = moai_shapes.write(tmp_path / "original", tensors, TINY_CONFIG)
    with pytest.raises(ConversionError, match=f"was quantised by {by} .*give the weights in float32"):
        plan_moai(str(folder))
    with pytest.raises(ConversionError, match=f"was quantised by {by}"):
        open_source(str(folder))


STATE = "x.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({STATE: torch.tensor([1, 2, 3], dtype=torch.uint8)}, "damaged or missing"),
        ({STATE: torch.tensor(list(b"[" * 60000), dtype=torch.uint8)}, "damaged or missing"),
        ({STATE: torch.zeros(70000, dtype=torch.uint8)}, "70000 bytes"),
        ({STATE: state((12, 51))}, "holds 300 values, not 306"),
        ({STATE: state((12, 50), block=0)}, "not all positive"),
        ({STATE: state((12, 50), block=2.5)}, "not all positive"),  # type: ignore[arg-type]
        ({STATE: state((-12, -50))}, "not all positive"),
        ({STATE: state((12, 50), dtype="int64")}, "damaged or missing"),
        ({STATE: state((12, 50), nested_blocksize=4)}, "nested_absmax"),
        ({"x.weight.quant_map": torch.ones(15)}, "15 values, not 16"),
        ({"x.weight.absmax": torch.ones(9)}, "9 values, not 10"),
        ({"x.weight": None}, "damaged or missing"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tensors = in_4_bits("x.weight", (12, 50), nested=False)[0] | changes
    folder = write(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ConversionError, match=message):
        Checkpoint(folder)


def test_eight_bits_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole = {"x.weight": torch.ones(6, 10, dtype=torch.int8), "x.SCB": torch.ones(6)}
    for changes in (
        {"x.SCB": torch.ones(5)},
        {"x.weight": torch.ones(6, 10)},
        {"x.weight": torch.ones(6, 0, dtype=torch.int8)},
        {"x.weight_format": torch.tensor(2, dtype=torch.uint8)},
    ):
        with pytest.raises(ConversionError, match="saved in 8 bits, but what belongs to it does not fit"):
            Checkpoint(write(tmp_path, whole | changes))
