"""Models held in 8 or 4 bits by torchao: what is quantised, what comes out, what is in memory, and what is saved."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_training
import torch
from transformers import AutoModelForCausalLM

from unimoe import cli
from unimoe.errors import CheckpointError, ConfigurationError, ConversionError, MissingPackageError
from unimoe.evaluation.running.runner import Options, check_settings, settings_of
from unimoe.inspection.expert_weights import expert_distances
from unimoe.inspection.model_description import describe_model
from unimoe.model_opener import open_model
from unimoe.modeling_unimoe.quantized_experts_unimoe import is_quantized
from unimoe.quantization import KINDS, quantization_config

pytest.importorskip("torchao", reason="the extra `quantize` is not installed")

from unimoe.modeling_unimoe.packed_int4_unimoe import PackedInt4Tensor

TEXT = {"num_shared_experts": 1, "shared_intermediate_size": 24, "num_null_experts": 1, "attention_bias": True}
INPUTS = {
    "input_ids": torch.tensor([tiny.prompt(1, "image", 5, 6, 7, "audio", 9, 11)]),
    **tiny.media(images=1, windows=1),
}
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts, shared experts, empty slots, a dense layer, biases and all towers."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model(TEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def quantized(folder: Path, kind: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config(kind)).eval()


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def test_the_decoders_matrices_are_quantised_and_nothing_else(quantized: torch.nn.Module) -> None:
    for name, parameter in quantized.named_parameters():
        last = name.removesuffix(".weight").rpartition(".")[2]
        expected = ".language_model.layers." in name and last in MATRICES and not name.endswith(".bias")
        assert is_quantized(parameter) == expected, name
        if not expected:
            assert parameter.dtype == torch.float32, name
    assert quantized.model.language_model.layers[0].mlp.experts.gate_up_proj.shape == (4, 96, tiny.HIDDEN)


def test_towers_can_be_quantised_too(folder: Path, kind: str) -> None:
    config = quantization_config(kind, towers=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()
    in_towers = [name for name, p in model.named_parameters() if "_tower." in name and is_quantized(p)]
    assert {name.split(".")[1] for name in in_towers} == {"vision_tower", "speech_tower", "audio_tower"}
    assert torch.isfinite(logits(model)).all()


def test_the_output_is_that_of_the_rounded_weights(folder: Path, quantized: torch.nn.Module) -> None:
    rounded = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = {
        name: weight.dequantize() if is_quantized(weight) else weight
        for name, weight in quantized.state_dict().items()
    }
    rounded.load_state_dict(weights)
    expected = logits(rounded)
    torch.testing.assert_close(logits(quantized), expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(quantized.generate(**INPUTS, **options), rounded.generate(**INPUTS, **options))


@pytest.mark.parametrize(("kind", "levels"), [("int8", 256), ("int4", 16)])
def test_weights_are_rounded_to_the_nearest_level(folder: Path, kind: str, levels: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    weight = model.get_parameter(name).detach()
    config = quantization_config(kind, group_size=8)
    held = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).get_parameter(name).dequantize()
    rows = weight.unflatten(-1, (-1, 8)) if kind == "int4" else weight
    reach = rows.amax(-1) - rows.amin(-1) if kind == "int4" else 2 * rows.abs().amax(-1)
    error = (held - weight).view_as(rows).abs().amax(-1)
    assert (error <= 0.51 * reach / (levels - 1) + 1e-6).all()
    assert error.max() > 0


def test_only_experts_with_tokens_are_brought_back_one_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config("int4"))
    experts = model.model.language_model.layers[0].mlp.experts
    shapes: list[torch.Size] = []
    bring_back = PackedInt4Tensor.dequantize
    monkeypatch.setattr(
        PackedInt4Tensor, "dequantize", lambda weight: shapes.append(weight.shape) or bring_back(weight)
    )
    chosen = torch.tensor([[0, 2], [2, 0], [0, 4]])  # 4 is "no expert"
    experts(torch.randn(3, tiny.HIDDEN), chosen, torch.ones(3, 2))
    assert [tuple(shape) for shape in shapes] == 2 * [(96, 32), (32, 48)]


def test_half_precision_and_rows_that_no_group_divides() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 24, dtype=torch.bfloat16)
    packed = PackedInt4Tensor.pack(weight, 8)
    assert packed.dtype == packed.dequantize().dtype == torch.bfloat16
    assert packed.qdata.numel() * 2 == weight.numel()
    assert (packed.dequantize() - weight).abs().max() < 0.2
    constant = torch.full((2, 8), 3.0)
    assert torch.equal(PackedInt4Tensor.pack(constant, 8).dequantize(), constant)
    from torchao.quantization import quantize_

    from unimoe.modeling_unimoe.packed_int4_unimoe import PackedInt4Config

    linear = torch.nn.Linear(12, 4)
    expected = copy.deepcopy(linear)
    quantize_(linear, PackedInt4Config(32))
    assert linear.weight.scale.shape == (4, 3)
    expected.weight.data = linear.weight.dequantize()
    x = torch.randn(2, 12, requires_grad=True)
    torch.testing.assert_close(linear(x), expected(x))
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, expected.weight.sum(0).expand(2, -1))
    with pytest.raises(ValueError, match="rows of 9 values"):
        quantize_(torch.nn.Linear(9, 4), PackedInt4Config(32))


def test_saved_quantised_it_is_small_and_the_same(folder: Path, quantized: torch.nn.Module, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(quantized))
    assert is_quantized(again.model.language_model.layers[0].mlp.shared_experts.down_proj)
    assert bytes_of(tmp_path) < 0.9 * bytes_of(folder)


def test_the_opener_quantises_and_opens_what_was_saved_so(kind: str, tmp_path: Path) -> None:
    processor = tiny_training.processor()
    for part in (tiny_training.model(processor, sparse=True), processor):
        part.save_pretrained(tmp_path / "full")
    opened, model = open_model(str(tmp_path / "full"), "cpu", kind)
    for part in (model, opened):
        part.save_pretrained(tmp_path / "small")
    _, again = open_model(str(tmp_path / "small"), "cpu", others=True)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    weight = again.get_parameter(name)
    assert is_quantized(weight)
    assert torch.equal(weight.dequantize(), model.get_parameter(name).dequantize())
    description = describe_model(str(tmp_path / "small"))
    assert (description.weights.problems, description.quantized_by) == ([], "torchao")
    with pytest.raises(ConversionError, match=r"saved with quantised weights.*folder that it was made of"):
        expert_distances(tmp_path / "small", model.config.text_config)

    from unimoe.serving.server import ModelServer, ServerSettings

    server = ModelServer(ServerSettings(str(tmp_path / "full"), device="cpu", quantize=kind))
    [served] = server._model_manager.loaded_models.values()
    assert torch.equal(served.model.get_parameter(name).dequantize(), weight.dequantize())
    with pytest.raises(CheckpointError, match="saved with quantised weights: leave out --quantize"):
        open_model(str(tmp_path / "small"), "cpu", kind)


REMOTE = r"""
import sys, torch
sys.meta_path.insert(0, __import__("hub_checks").HideUnimoe())
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
    return model(**torch.load("inputs")).logits

PackedInt4Config = get_class_from_dynamic_module("packed_int4_unimoe.PackedInt4Config", sys.argv[1])
names = r"re:model\.language_model\.layers\.\d+\.(self_attn\..*_proj\.weight|mlp\.\w+_proj\.weight|mlp\..*experts\..*)"
with torch.no_grad():
    for kind, how in (("int8", Int8WeightOnlyConfig()), ("int4", PackedInt4Config())):
        torch.save(logits(kind), kind + ".saved")
        torch.save(logits(sys.argv[1], quantization_config=TorchAoConfig(FqnToConfig({names: how}))), kind + ".loaded")
    how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[sys.argv[2]])
    torch.save(logits(sys.argv[1], quantization_config=how), "bitsandbytes.loaded")
"""


def test_without_the_package_it_loads_and_is_quantised_as_remote_code(folder: Path, tmp_path: Path) -> None:
    torch.save(INPUTS, tmp_path / "inputs")
    expected = {}
    for kind in KINDS:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config(kind)).eval()
        model.save_pretrained(tmp_path / kind)
        expected[kind] = logits(model)
    by_bitsandbytes = quantization_config("int8", library="bitsandbytes")
    command = [sys.executable, "-c", REMOTE, str(folder), *by_bitsandbytes.llm_int8_skip_modules]
    paths = os.pathsep.join([str(Path(tiny.__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        assert torch.equal(torch.load(tmp_path / f"{kind}.saved"), expected[kind])
        assert torch.equal(torch.load(tmp_path / f"{kind}.loaded"), expected[kind])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=by_bitsandbytes).eval()
    assert torch.equal(torch.load(tmp_path / "bitsandbytes.loaded"), logits(model))


def test_commands_quantise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processor = tiny_training.processor()
    for part in (tiny_training.model(processor, sparse=True), processor):
        part.save_pretrained(tmp_path)
    options = ["--once", "Hi", "--max-new-tokens", "3", "--device", "cpu", "--json"]
    assert cli.main(["chat", str(tmp_path), *options, "--quantize", "int4"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 3
    settings_of([], Options("m", quantize="int8")).save(tmp_path)
    with pytest.raises(CheckpointError, match="quantize was 'int8' and is None"):
        check_settings(settings_of([], Options("m")), tmp_path, resume=True)


def test_what_cannot_be_done_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigurationError, match="int8 or int4 by torchao or bitsandbytes, not in 'int3' by 'torchao'"
    ):
        quantization_config("int3")
    with pytest.raises(ConfigurationError, match="group_size is 5"):
        quantization_config("int4", group_size=5)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="no model of ours"):
        open_model(str(tmp_path), "cpu", "int8", others=True)
    monkeypatch.setattr("transformers.utils.is_torchao_available", lambda: False)
    with pytest.raises(MissingPackageError, match=r"int8 needs torchao: pip install 'unimoe\[quantize\]'"):
        quantization_config("int8")
