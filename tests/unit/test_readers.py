"""Readers of published weights: tiny files written here must come back bit for bit, damaged ones must be refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import EfficientNetModel, MobileNetV2Model, WhisperConfig, WhisperForConditionalGeneration

from unimoe.errors import PartError
from unimoe.quickstart.read_ctranslate2 import read_ctranslate2, whisper_from_ctranslate2
from unimoe.quickstart.read_efficientnet import (
    efficientnet_lite2_config,
    efficientnet_lite2_state,
    read_state_dict,
)
from unimoe.quickstart.read_keras import convert_mobilenet_v2, mobilenet_v2_from_keras, read_keras_weights

h5py = pytest.importorskip("h5py", reason="h5py comes with the quickstart extra")

_TYPE_IDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


# --- CTranslate2 -----------------------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def _ct2_bytes(arrays: dict[str, np.ndarray], specification: str = "WhisperSpec") -> bytes:
    out = struct.pack("<I", 6) + _text(specification) + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        out += _text(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        out += struct.pack("<BI", _TYPE_IDS[str(array.dtype)], array.nbytes) + array.tobytes()
    first = next(iter(arrays))
    return out + struct.pack("<I", 1) + _text("alias") + _text(first)


def _small_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a/weight": rng.standard_normal((3, 4)).astype(np.float16),
        "b": rng.standard_normal(5).astype(np.float32),
        "heads": np.array(6, dtype=np.int16),
        "flag": np.array(1, dtype=np.int8),
    }


def test_ctranslate2_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    arrays = _small_arrays()
    path = tmp_path / "model.bin"
    path.write_bytes(_ct2_bytes(arrays))
    model = read_ctranslate2(path)
    assert (model.specification, model.revision, model.aliases) == ("WhisperSpec", 3, {"alias": "a/weight"})
    assert list(model.arrays) == list(arrays)
    for name, array in arrays.items():
        assert model.arrays[name].dtype == array.dtype
        assert model.arrays[name].shape == array.shape
        assert model.arrays[name].tobytes() == array.tobytes()


def test_ctranslate2_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = _ct2_bytes(_small_arrays())
    path = tmp_path / "model.bin"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PartError, match="not a whole CTranslate2 model"):
            read_ctranslate2(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(PartError, match="1 bytes follow its end"):
        read_ctranslate2(path)


def test_ctranslate2_flipped_bytes_never_raise_anything_but_part_error(tmp_path: Path) -> None:
    whole = _ct2_bytes(_small_arrays())
    path = tmp_path / "model.bin"
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read_ctranslate2(path)
        except PartError:
            refused += 1
    assert refused > 40  # the rest hit values, which carry no checksum of their own


def test_ctranslate2_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(PartError, match="its version is"):
        read_ctranslate2(path)
    header = struct.pack("<I", 6) + _text("WhisperSpec") + struct.pack("<II", 3, 1)
    path.write_bytes(header + _text("huge") + struct.pack("<B4I", 4, *[2**31] * 4) + struct.pack("<BI", 0, 16))
    with pytest.raises(PartError, match=r"'huge' of shape .* has 16 bytes"):
        read_ctranslate2(path)
    path.write_bytes(header + _text("odd") + struct.pack("<BI", 1, 1) + struct.pack("<BI", 77, 4) + bytes(4))
    with pytest.raises(PartError, match="unknown type 77"):
        read_ctranslate2(path)


def _tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=51864,
        d_model=8,
        num_mel_bins=80,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=12,
        max_source_positions=1500,
        max_target_positions=20,
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        decoder_start_token_id=50257,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half().float())
    return model


def _whisper_arrays(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The model's tensors under CTranslate2's names, written out independently of the reader's table."""
    state = {key.removeprefix("model."): value.numpy().astype(np.float16) for key, value in model.state_dict().items()}
    arrays = {
        "encoder/num_heads": np.array(2, dtype=np.int16),
        "decoder/num_heads": np.array(2, dtype=np.int16),
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
    }
    for name in ("conv1", "conv2"):
        arrays[f"encoder/{name}/weight"] = state[f"encoder.{name}.weight"]
        arrays[f"encoder/{name}/bias"] = state[f"encoder.{name}.bias"]

    def norm(theirs: str, ours: str) -> None:
        arrays[f"{theirs}/gamma"], arrays[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    def linear(theirs: str, *ours: str) -> None:
        zeros = np.zeros(8, dtype=np.float16)
        arrays[f"{theirs}/weight"] = np.concatenate([state[f"{name}.weight"] for name in ours])
        arrays[f"{theirs}/bias"] = np.concatenate([state.get(f"{name}.bias", zeros) for name in ours])

    for side, layers in (("encoder", 2), ("decoder", 1)):
        arrays[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for index in range(layers):
            theirs, ours = f"{side}/layer_{index}", f"{side}.layers.{index}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", *[f"{ours}.self_attn.{x}_proj" for x in "qkv"])
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn.k_proj", f"{ours}.encoder_attn.v_proj")
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    return arrays


@pytest.fixture(scope="module")
def whisper() -> WhisperForConditionalGeneration:
    return _tiny_whisper()


def test_whisper_of_a_ctranslate2_file_equals_the_model_it_was_made_from(tmp_path: Path, whisper) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(_ct2_bytes(_whisper_arrays(whisper)))
    config, state = whisper_from_ctranslate2(read_ctranslate2(path))
    for field in ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"):
        assert getattr(config, field) == getattr(whisper.config, field), field
    assert (config.max_source_positions, config.max_target_positions) == (1500, 20)
    expected = {key: value for key, value in whisper.state_dict().items() if key != "proj_out.weight"}
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("encoder/layer_1/ffn/linear_0/weight"), "lacks the tensor 'encoder/layer_1"),
        (lambda arrays: arrays.update({"encoder/conv2/bias": np.full(8, np.nan, np.float16)}), "not finite"),
        (lambda arrays: arrays.update({"encoder/conv2/bias": np.zeros(8, np.int8)}), "quantised"),
        (lambda arrays: arrays.update({"decoder/embeddings/weight": np.zeros((9, 8), np.float16)}), "has 9 tokens"),
    ],
)
def test_incomplete_whisper_is_refused(tmp_path: Path, whisper, change, message: str) -> None:
    arrays = _whisper_arrays(whisper)
    change(arrays)
    path = tmp_path / "model.bin"
    path.write_bytes(_ct2_bytes(arrays))
    with pytest.raises(PartError, match=message):
        whisper_from_ctranslate2(read_ctranslate2(path))


def test_other_specification_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(_ct2_bytes(_small_arrays(), "TransformerSpec"))
    with pytest.raises(PartError, match="'TransformerSpec'"):
        whisper_from_ctranslate2(read_ctranslate2(path))


# --- Keras -----------------------------------------------------------------------------------------------------------

_STRIDE_2_BLOCKS = (1, 3, 6, 13)


def _mobilenet_arrays() -> dict[str, np.ndarray]:
    """Random MobileNetV2 weights under Keras' names and in Keras' layout [height, width, in, out]."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def layer(name: str, norm: str, shape: tuple[int, ...], channels: int) -> None:
        fan_in = np.prod(shape[:2]) * (1 if "depthwise" in name else shape[2])
        arrays[f"{name}/kernel"] = (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)
        for variable, low, high in (("gamma", 0.5, 1.5), ("beta", -0.5, 0.5), ("moving_mean", -0.5, 0.5)):
            arrays[f"{norm}/{variable}"] = rng.uniform(low, high, channels).astype(np.float32)
        arrays[f"{norm}/moving_variance"] = rng.uniform(0.5, 1.5, channels).astype(np.float32)

    layer("Conv1", "bn_Conv1", (3, 3, 3, 32), 32)
    layer("expanded_conv_depthwise", "expanded_conv_depthwise_BN", (3, 3, 32, 1), 32)
    layer("expanded_conv_project", "expanded_conv_project_BN", (1, 1, 32, 16), 16)
    widths = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320]
    for index in range(1, 17):
        narrow, wide, out = widths[index - 1], 6 * widths[index - 1], widths[index]
        layer(f"block_{index}_expand", f"block_{index}_expand_BN", (1, 1, narrow, wide), wide)
        layer(f"block_{index}_depthwise", f"block_{index}_depthwise_BN", (3, 3, wide, 1), wide)
        layer(f"block_{index}_project", f"block_{index}_project_BN", (1, 1, wide, out), out)
    layer("Conv_1", "Conv_1_bn", (1, 1, 320, 1280), 1280)
    return arrays


def _keras_forward(arrays: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """MobileNetV2 as Keras computes it, straight from its arrays: [n, 3, s, s] → [n, 1280, s/32, s/32]."""

    def run(x: torch.Tensor, name: str, norm: str, stride: int = 1, activate: bool = True) -> torch.Tensor:
        kernel = torch.from_numpy(arrays[f"{name}/kernel"])
        depthwise = "depthwise" in name
        weight = kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1)
        if weight.shape[-1] == 3:
            x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        x = F.conv2d(x, weight, stride=stride, groups=weight.shape[0] if depthwise else 1)
        keys = ("moving_mean", "moving_variance", "gamma", "beta")
        x = F.batch_norm(x, *(torch.from_numpy(arrays[f"{norm}/{key}"]) for key in keys), eps=1e-3)
        return x.clamp(0, 6) if activate else x

    x = run(x, "Conv1", "bn_Conv1", stride=2)
    x = run(x, "expanded_conv_depthwise", "expanded_conv_depthwise_BN")
    x = run(x, "expanded_conv_project", "expanded_conv_project_BN", activate=False)
    for index in range(1, 17):
        block = f"block_{index}"
        y = run(x, f"{block}_expand", f"{block}_expand_BN")
        y = run(y, f"{block}_depthwise", f"{block}_depthwise_BN", stride=2 if index in _STRIDE_2_BLOCKS else 1)
        y = run(y, f"{block}_project", f"{block}_project_BN", activate=False)
        x = x + y if x.shape == y.shape else y
    return run(x, "Conv_1", "Conv_1_bn")


def _write_h5(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"model_weights/mobilenetv2_1.00_160/{name}"] = array


def test_keras_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    arrays = {"conv/kernel": np.random.default_rng(1).random((3, 3, 2, 4)).astype(np.float32)}
    arrays["conv_bn/beta"] = np.arange(4, dtype=np.float32)
    _write_h5(tmp_path / "w.h5", arrays)
    read = read_keras_weights(tmp_path / "w.h5", "model_weights/mobilenetv2_1.00_160")
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("size", [128, 160])
def test_mobilenet_computes_what_keras_computes(tmp_path: Path, size: int) -> None:
    arrays = _mobilenet_arrays()
    _write_h5(tmp_path / "w.h5", arrays)
    target = tmp_path / "target"
    target.mkdir()
    convert_mobilenet_v2(tmp_path, target)
    model, info = MobileNetV2Model.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours = model.eval()(x).last_hidden_state
    difference = (ours - _keras_forward(arrays, x)).abs().max().item()
    print(f"MobileNetV2 at {size} px, random weights: max |difference| {difference:.1e}")
    assert ours.std() > 0.1
    assert difference < 1e-5


def test_incomplete_mobilenet_is_refused() -> None:
    arrays = _mobilenet_arrays()
    del arrays["block_7_project/kernel"]
    with pytest.raises(PartError, match="block_7_project/kernel"):
        mobilenet_v2_from_keras(arrays, 160)


def test_keras_garbage_and_truncation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    _write_h5(path, {"a/b": np.ones(1000, np.float32)})
    whole = path.read_bytes()
    for content in (b"", b"no HDF5 at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(PartError, match="cannot be read as a Keras HDF5 file"):
            read_keras_weights(path, "model_weights")
    path.write_bytes(whole)
    with pytest.raises(PartError, match="has no 'other'"):
        read_keras_weights(path, "other")


def test_keras_file_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.h5"
    _write_h5(secret, {"a/b": np.ones(3, np.float32)})
    (tmp_path / "raw.bin").write_bytes(bytes(12))

    def external_link(group) -> None:
        group["x"] = h5py.ExternalLink(str(secret), "/model_weights")

    def soft_link(group) -> None:
        group["x"] = h5py.SoftLink("/model_weights")

    def external_storage(group) -> None:
        group.create_dataset("x", shape=(3,), dtype="f4", external=[(str(tmp_path / "raw.bin"), 0, 12)])

    def virtual(group) -> None:
        layout = h5py.VirtualLayout(shape=(3,), dtype="f4")
        layout[:] = h5py.VirtualSource(str(secret), "model_weights/mobilenetv2_1.00_160/a/b", shape=(3,))
        group.create_virtual_dataset("x", layout)

    def endless(group) -> None:
        group["x"] = group

    def huge(group) -> None:
        group.create_dataset("x", shape=(2**40,), dtype="f4", chunks=(1024,))

    def pickled(group) -> None:
        group["x"] = np.array([b"cos\nsystem"], dtype="S16")

    for name, write in {
        "is a link to elsewhere": external_link,
        "is a link to else": soft_link,
        "in another file": external_storage,
        "in another": virtual,
        "nests its groups": endless,
        "holds more than": huge,
        "not an array of floats": pickled,
    }.items():
        path = tmp_path / f"{write.__name__}.h5"
        with h5py.File(path, "w") as file:
            write(file.create_group("model_weights"))
        with pytest.raises(PartError, match=name):
            read_keras_weights(path, "model_weights")


# --- EfficientNet-Lite -----------------------------------------------------------------------------------------------

_LITE2_STAGES = ((1, 1, 3, 1), (3, 6, 3, 2), (3, 6, 5, 2), (4, 6, 3, 2), (4, 6, 5, 1), (5, 6, 5, 2), (1, 6, 3, 1))
_LITE2_OUT = (16, 24, 48, 88, 120, 208, 352)


def _lite2_blocks() -> list[tuple[int, int, int, int, int]]:
    """(in, out, expansion, kernel, stride) of each block of EfficientNet-Lite2."""
    blocks, narrow = [], 32
    for (repeats, expansion, kernel, stride), out in zip(_LITE2_STAGES, _LITE2_OUT, strict=True):
        for index in range(repeats):
            blocks.append((narrow, out, expansion, kernel, stride if index == 0 else 1))
            narrow = out
    return blocks


def _lite2_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def layer(name: str, norm: str, shape: tuple[int, ...]) -> None:
        scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        for key, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.5, 0.5)):
            tensors[f"{norm}.{key}"] = torch.rand(shape[0], generator=generator) * (high - low) + low
        tensors[f"{norm}.running_var"] = torch.rand(shape[0], generator=generator) + 0.5

    layer("_conv_stem", "_bn0", (32, 3, 3, 3))
    for index, (narrow, out, expansion, kernel, _) in enumerate(_lite2_blocks()):
        wide, block = narrow * expansion, f"_blocks.{index}"
        if expansion > 1:
            layer(f"{block}._expand_conv", f"{block}._bn0", (wide, narrow, 1, 1))
        layer(f"{block}._depthwise_conv", f"{block}._bn1", (wide, 1, kernel, kernel))
        layer(f"{block}._project_conv", f"{block}._bn2", (out, wide, 1, 1))
    layer("_conv_head", "_bn1", (1280, 352, 1, 1))
    return tensors


def _lite2_forward(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite2 straight from the published tensors, with TensorFlow's SAME padding."""

    def run(x: torch.Tensor, name: str, norm: str, stride: int = 1, activate: bool = True) -> torch.Tensor:
        weight = tensors[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=weight.shape[0] if "depthwise" in name else 1)
        statistics = (tensors[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *statistics, eps=1e-3)
        return x.clamp(0, 6) if activate else x

    x = run(x, "_conv_stem", "_bn0", stride=2)
    for index, (narrow, out, expansion, _, stride) in enumerate(_lite2_blocks()):
        block, y = f"_blocks.{index}", x
        if expansion > 1:
            y = run(y, f"{block}._expand_conv", f"{block}._bn0")
        y = run(y, f"{block}._depthwise_conv", f"{block}._bn1", stride=stride)
        y = run(y, f"{block}._project_conv", f"{block}._bn2", activate=False)
        x = x + y if stride == 1 and narrow == out else y
    return run(x, "_conv_head", "_bn1")


def test_efficientnet_lite2_computes_what_the_published_network_computes() -> None:
    tensors = _lite2_tensors()
    model = EfficientNetModel(efficientnet_lite2_config()).eval()
    outcome = model.load_state_dict(efficientnet_lite2_state(tensors), strict=False)
    assert not outcome.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in outcome.missing_keys)
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        ours, theirs = model(x).last_hidden_state, _lite2_forward(tensors, x)
    difference = (ours - theirs).abs().max().item()
    print(f"EfficientNet-Lite2 at 96 px, random weights: max |difference| {difference:.1e}")
    assert ours.std() > 0.1
    assert difference < 1e-5


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "w.pth"
    torch.save({"weight": torch.ones(2), "payload": Payload()}, path)
    with pytest.raises(PartError, match="not a plain PyTorch state dict"):
        read_state_dict(path)
    assert not (tmp_path / "executed").exists()
    torch.save({"weight": "text"}, path)
    with pytest.raises(PartError, match="something other than named tensors"):
        read_state_dict(path)
    torch.save({"weight": torch.tensor([float("nan")])}, path)
    with pytest.raises(PartError, match="not finite"):
        read_state_dict(path)
    path.write_bytes(b"garbage")
    with pytest.raises(PartError, match="not a plain PyTorch state dict"):
        read_state_dict(path)


def test_incomplete_efficientnet_is_refused() -> None:
    tensors = _lite2_tensors()
    del tensors["_blocks.3._bn2.running_var"]
    with pytest.raises(PartError, match=r"lacks _blocks\.3\._bn2"):
        efficientnet_lite2_state(tensors)
