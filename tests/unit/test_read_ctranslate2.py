"""CTranslate2's files: tiny files written here must come back bit for bit, damaged ones must be refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from unimoe.errors import PartError
from unimoe.quickstart.read_ctranslate2 import read_ctranslate2, whisper_from_ctranslate2

_TYPE_IDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


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
