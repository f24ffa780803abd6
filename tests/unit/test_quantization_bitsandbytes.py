"""Models held in 8 or 4 bits by bitsandbytes: experts are cut apart on loading, each quantised by itself."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForCausalLM

from unimoe.modeling_unimoe.linear_experts_unimoe import UniMoeLinearExperts
from unimoe.quantization import KINDS, quantization_config

bnb = pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed")

# Rows of 64: the CPU kernels of bitsandbytes 0.50 bring back other values where blocks of 64 run over the ends of rows.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_shared_experts": 1,
    "shared_intermediate_size": 64,
    "num_null_experts": 1,
    "attention_bias": True,
}
SENSES = ("vision_config", "speech_config", "audio_config", "image_connector", "speech_connector", "sound_connector")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.model(TEXT, **dict.fromkeys(SENSES)).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str, device: str) -> torch.nn.Module:
    config = quantization_config(kind, library="bitsandbytes")
    config.bnb_4bit_compute_dtype = torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": device}).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]], device=model.device)).logits.cpu()


def brought_back(layer: torch.nn.Module) -> torch.Tensor:
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).cpu()


def rounded_like(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The model with fused experts in full precision, its weights rounded as those of the quantised one."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, module in model.named_modules():
        if isinstance(module, UniMoeLinearExperts):
            for part in ("gate_up_proj", "down_proj"):
                stack = torch.stack([brought_back(layer) for layer in getattr(module, part)])
                plain.get_parameter(f"{name}.{part}").data = stack
        elif isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and "experts." not in name:
            plain.get_parameter(f"{name}.weight").data = brought_back(module)
    return plain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_quantised_and_the_output_is_that_of_the_rounded_weights(
    folder: Path, kind: str, device: str, tmp_path: Path
) -> None:
    model = load(folder, kind, device)
    layers = model.model.language_model.layers
    held = {name for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes.")}
    # Two sparse layers: four projections and 4 + 1 experts of two matrices each; one dense: four and three.
    assert len(held) == 2 * (4 + 2 * 5) + 4 + 3
    assert all(name.startswith("model.language_model.layers.") for name in held)
    experts = layers[2].mlp.experts
    assert {layer.weight.dtype for layer in experts.down_proj} == {torch.int8 if kind == "int8" else torch.uint8}
    weight = AutoModelForCausalLM.from_pretrained(folder).model.language_model.layers[2].mlp.experts.down_proj
    held_back = torch.stack([brought_back(layer) for layer in experts.down_proj])
    # A row has its own scale in 8 bits, a run of 64 values in 4, whose levels are up to 0.3 apart.
    largest = weight.abs().amax(-1, keepdim=True)
    assert ((held_back - weight).abs() <= 0.6 * (largest / 127 if kind == "int8" else 0.3 * largest)).all()
    assert not torch.equal(held_back, weight)

    # Both first: on a CPU the first input has weights rearranged, and their scales rounded.
    model.save_pretrained(tmp_path)
    expected = logits(rounded_like(model, folder))
    output = logits(model)
    # In 8 bits inputs are rounded too, in 4 the CPU computes in bfloat16. Rounding weights to 4 bits alone moves them by 0.6.
    assert (output - expected).abs().mean() < 0.06

    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": device}).eval()
    assert torch.equal(logits(again), output)
    base = AutoModel.from_pretrained(tmp_path, device_map={"": device})
    assert isinstance(base.language_model.layers[0].mlp.shared_experts, UniMoeLinearExperts)


def load_plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_without_bitsandbytes_experts_stay_fused(folder: Path) -> None:
    assert not [m for m in load_plain(folder).modules() if isinstance(m, UniMoeLinearExperts)]
