"""Models in 8 and 4 bits on the stand-in for CUDA: where their parts are, in what dtype, and what their experts wait for."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cuda_stand_in import CUDA, CudaStandIn, CudaTensor
from transformers import AutoModelForCausalLM

from unimoe.modeling_unimoe.quantized_experts_unimoe import is_quantized
from unimoe.quantization import KINDS, quantization_config

pytest.importorskip("torchao", reason="the extra `quantize` is not installed")

from unimoe.modeling_unimoe.packed_int4_unimoe import PackedInt4Tensor

TEXT = {"num_shared_experts": 1, "shared_intermediate_size": 24, "num_null_experts": 1, "attention_bias": True}
INPUTS = {
    "input_ids": torch.tensor([tiny.prompt(1, "image", 5, 6, 7, "audio", 9, 11)]),
    **tiny.media(images=1, windows=1),
}
# Two sparse layers, each of routed and of shared experts: how many tokens every expert has, for all of them at once.
WAITS = {"encoding_unimoe.py:place_features": 1, "quantized_experts_unimoe.py:tokens_of_experts": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.model(TEXT).save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def quantized(folder: Path, request: pytest.FixtureRequest) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config(request.param)).eval()


def parts_of(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a quantised weight consists of."""
    parts = {name: getattr(parameter, name, None) for name in ("qdata", "scale", "zero_point")}
    return {name: part for name, part in parts.items() if part is not None}


def test_a_quantised_model_moves_and_computes(quantized: torch.nn.Module) -> None:
    weights = {name: parameter for name, parameter in quantized.named_parameters() if is_quantized(parameter)}
    dtypes = {name: {part: t.dtype for part, t in parts_of(weight).items()} for name, weight in weights.items()}
    with torch.no_grad():
        expected = quantized(**INPUTS).logits
        with CudaStandIn() as cuda:
            quantized.to("cuda")
            inputs = {name: value.to("cuda") for name, value in INPUTS.items()}
            assert {parameter.device for parameter in quantized.parameters()} == {CUDA}
            for name in weights:
                moved = quantized.get_parameter(name)
                assert {part: t.dtype for part, t in parts_of(moved).items()} == dtypes[name]
                assert all(isinstance(part, CudaTensor) for part in parts_of(moved).values())
            cuda.waits.clear()
            logits = quantized(**inputs).logits
            assert cuda.ours() == WAITS
    torch.testing.assert_close(logits.twin, expected, rtol=1e-4, atol=1e-4)


def test_a_generated_token_waits_once_for_the_experts_of_every_layer(quantized: torch.nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with CudaStandIn() as cuda, torch.no_grad():
        quantized.to("cuda")
        cache = quantized(input_ids=ids.to("cuda"), use_cache=True).past_key_values
        token = torch.tensor([[8]]).to("cuda")
        cuda.waits.clear()
        quantized(input_ids=token, past_key_values=cache)
        assert cuda.ours() == {"quantized_experts_unimoe.py:tokens_of_experts": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_packed_and_used_on_the_device(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 6, 64).to(dtype)
    packed = PackedInt4Tensor.pack(weight, 32)
    x = torch.randn(2, 64)
    with CudaStandIn() as cuda:
        there, x_there = PackedInt4Tensor.pack(weight.to("cuda"), 32), x.to("cuda")
        cuda.waits.clear()
        assert (there.device, there.dtype) == (CUDA, dtype)
        results = [there[1].dequantize(), torch.nn.functional.linear(x_there, there[1])]
        assert not cuda.waits
        back = there.cpu()
        assert cuda.ours() == {"elsewhere": 3}  # its three tensors
    assert (back.device.type, back.dtype) == ("cpu", dtype)
    expected = [packed[1].dequantize(), torch.nn.functional.linear(x, packed[1])]
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype
        torch.testing.assert_close(result.twin, value)
    assert torch.equal(back.dequantize(), packed.dequantize())


def test_a_weight_of_another_device_is_refused() -> None:
    packed: Any = PackedInt4Tensor.pack(torch.randn(6, 64), 32)
    with CudaStandIn(), pytest.raises(RuntimeError, match="cpu and cuda"):
        torch.nn.functional.linear(torch.randn(2, 64).to("cuda"), packed)
