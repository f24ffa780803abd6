"""CTranslate2 `model.bin` files, read with numpy alone, and the Whisper model inside one.

The layout (version 6, little endian): version, specification name, revision and number of variables; then for each
variable its name, rank, dimensions, type, size in bytes and values; then the aliases (name → variable). Every size
is checked against the bytes that are really there before it is used.
"""

import json
import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PartError

if TYPE_CHECKING:
    import torch
    from transformers import WhisperConfig

_VERSION = 6
_MAX_RANK = 8
_MAX_NAME_BYTES = 1024
_FILE_BYTES_LIMIT = 4 << 30
# 5 is bfloat16, which numpy has no type for; no published wheel uses it.
_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}

# Ids of the English-only vocabulary; the multilingual one is shifted by one and has 51865 entries.
_ENGLISH_VOCABULARY = 51864
_END_OF_TEXT, _START_OF_TRANSCRIPT, _NO_TIMESTAMPS = 50256, 50257, 50362


@dataclass(frozen=True)
class CTranslate2Model:
    """What a `model.bin` holds. The arrays are read-only views of the file's bytes."""

    specification: str
    revision: int
    arrays: dict[str, np.ndarray]
    aliases: dict[str, str]


class _Bytes:
    """A cursor over the file's bytes that refuses to go past their end."""

    def __init__(self, path: Path):
        size = path.stat().st_size
        if size > _FILE_BYTES_LIMIT:
            raise PartError(f"{path} has {size} bytes; CTranslate2 files up to {_FILE_BYTES_LIMIT} are read.")
        self.path = path
        self.data = path.read_bytes()
        self.offset = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.offset:
            raise self.error(f"{count} bytes are needed at offset {self.offset}, but the file has {len(self.data)}")
        self.offset += count
        return memoryview(self.data)[self.offset - count : self.offset]

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        length = self.number("<H")
        if not 0 < length <= _MAX_NAME_BYTES:
            raise self.error(f"a name of {length} bytes at offset {self.offset}")
        raw = bytes(self.take(length))
        if raw[-1:] != b"\0":
            raise self.error(f"a name without its closing zero at offset {self.offset}")
        try:
            return raw[:-1].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a name that is not UTF-8 at offset {self.offset}") from error

    def error(self, what: str) -> PartError:
        return PartError(
            f"{self.path} is not a whole CTranslate2 model of version {_VERSION}: {what}. Fetch it again."
        )


def read_ctranslate2(path: Path) -> CTranslate2Model:
    """Read the CTranslate2 binary at `path`. Raises PartError for anything that is not a whole version 6 file."""
    source = _Bytes(path)
    version = source.number("<I")
    if version != _VERSION:
        raise source.error(f"its version is {version}")
    specification, revision = source.text(), source.number("<I")
    arrays: dict[str, np.ndarray] = {}
    for _ in range(source.number("<I")):
        name = source.text()
        if name in arrays:
            raise source.error(f"the variable {name!r} comes twice")
        arrays[name] = _read_array(source, name)
    aliases = {}
    for _ in range(source.number("<I")):
        alias, name = source.text(), source.text()
        if name not in arrays:
            raise source.error(f"the alias {alias!r} names {name!r}, which does not exist")
        aliases[alias] = name
    if source.offset != len(source.data):
        raise source.error(f"{len(source.data) - source.offset} bytes follow its end")
    return CTranslate2Model(specification, revision, arrays, aliases)


def _read_array(source: _Bytes, name: str) -> np.ndarray:
    rank = source.number("<B")
    if rank > _MAX_RANK:
        raise source.error(f"the variable {name!r} has {rank} dimensions")
    shape = [source.number("<I") for _ in range(rank)]
    type_id, size = source.number("<B"), source.number("<I")
    if type_id not in _DTYPES:
        raise source.error(f"the variable {name!r} has the unknown type {type_id}")
    dtype = np.dtype(_DTYPES[type_id])
    if math.prod(shape) * dtype.itemsize != size:
        raise source.error(f"the variable {name!r} of shape {shape} and type {dtype} has {size} bytes")
    return np.frombuffer(source.take(size), dtype=dtype).reshape(shape)


def whisper_from_ctranslate2(model: CTranslate2Model) -> tuple["WhisperConfig", dict[str, "torch.Tensor"]]:
    """Configuration and float32 state dict of `WhisperForConditionalGeneration` from a converted English-only Whisper.

    Raises PartError when the file holds another model, lacks a tensor, is quantised or has values that are not finite.
    """
    from transformers import WhisperConfig

    if model.specification != "WhisperSpec":
        raise PartError(f"A WhisperSpec model is needed, but this CTranslate2 file holds {model.specification!r}.")
    state = _WhisperState(model)
    vocabulary, width = state.shape("decoder/embeddings/weight", 2)
    if vocabulary != _ENGLISH_VOCABULARY:
        raise PartError(
            f"This Whisper has {vocabulary} tokens; only English-only models ({_ENGLISH_VOCABULARY}) are converted."
        )
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=state.shape("encoder/conv1/weight", 3)[1],
        encoder_layers=state.layers("encoder"),
        decoder_layers=state.layers("decoder"),
        encoder_attention_heads=state.integer("encoder/num_heads"),
        decoder_attention_heads=state.integer("decoder/num_heads"),
        encoder_ffn_dim=state.shape("encoder/layer_0/ffn/linear_0/weight", 2)[0],
        decoder_ffn_dim=state.shape("decoder/layer_0/ffn/linear_0/weight", 2)[0],
        max_source_positions=state.shape("encoder/position_encodings/encodings", 2)[0],
        max_target_positions=state.shape("decoder/position_encodings/encodings", 2)[0],
        pad_token_id=_END_OF_TEXT,
        bos_token_id=_END_OF_TEXT,
        eos_token_id=_END_OF_TEXT,
        decoder_start_token_id=_START_OF_TRANSCRIPT,
    )
    return config, state.convert(config.encoder_layers, config.decoder_layers, width)


class _WhisperState:
    """Names of CTranslate2's Whisper on one side, names of transformers' on the other."""

    def __init__(self, model: CTranslate2Model):
        self.model = model
        self.state: dict[str, torch.Tensor] = {}

    def array(self, name: str) -> np.ndarray:
        if name not in self.model.arrays:
            raise PartError(f"The Whisper file lacks the tensor {name!r}; it is not a complete encoder and decoder.")
        return self.model.arrays[name]

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self.array(name).shape
        if len(shape) != rank:
            raise PartError(f"The Whisper tensor {name!r} has shape {shape}, but {rank} dimensions are needed.")
        return shape

    def integer(self, name: str) -> int:
        return int(self.array(name).reshape(-1)[0])

    def layers(self, side: str) -> int:
        prefix = f"{side}/layer_"  # also the start of "encoder/layer_norm"
        numbers = (name.removeprefix(prefix).split("/")[0] for name in self.model.arrays if name.startswith(prefix))
        return len({number for number in numbers if number.isdecimal()})

    def tensor(self, name: str) -> "torch.Tensor":
        import torch

        array = self.array(name)
        if array.dtype.kind != "f":
            raise PartError(f"The Whisper tensor {name!r} is {array.dtype} (quantised); float16 or float32 is needed.")
        if not np.isfinite(array).all():
            raise PartError(f"The Whisper tensor {name!r} has values that are not finite; the file is damaged.")
        return torch.from_numpy(array.astype(np.float32))

    def put(self, target: str, source: str, *, weight: str = "weight", bias: str = "bias") -> None:
        self.state[f"{target}.weight"] = self.tensor(f"{source}/{weight}")
        self.state[f"{target}.bias"] = self.tensor(f"{source}/{bias}")

    def put_norm(self, target: str, source: str) -> None:
        self.put(target, source, weight="gamma", bias="beta")

    def put_fused(self, target: str, source: str, projections: str, width: int) -> None:
        """Split a fused projection. Whisper's keys have no bias: CTranslate2 keeps zeros in their place."""
        weight, bias = self.tensor(f"{source}/weight"), self.tensor(f"{source}/bias")
        if weight.shape != (len(projections) * width, width):
            raise PartError(f"The Whisper tensor {source}/weight has shape {tuple(weight.shape)}, not {projections}.")
        for index, letter in enumerate(projections):
            rows = slice(index * width, (index + 1) * width)
            self.state[f"{target}.{letter}_proj.weight"] = weight[rows].clone()
            if letter != "k":
                self.state[f"{target}.{letter}_proj.bias"] = bias[rows].clone()

    def convert(self, encoder_layers: int, decoder_layers: int, width: int) -> dict[str, "torch.Tensor"]:
        for convolution in ("conv1", "conv2"):
            self.put(f"model.encoder.{convolution}", f"encoder/{convolution}")
        for side, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
            self.state[f"model.{side}.embed_positions.weight"] = self.tensor(f"{side}/position_encodings/encodings")
            self.put_norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
            for index in range(layers):
                self.convert_layer(f"model.{side}.layers.{index}", f"{side}/layer_{index}", side == "decoder", width)
        self.state["model.decoder.embed_tokens.weight"] = self.tensor("decoder/embeddings/weight")
        return self.state

    def convert_layer(self, target: str, source: str, is_decoder: bool, width: int) -> None:
        self.put_norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        self.put_fused(f"{target}.self_attn", f"{source}/self_attention/linear_0", "qkv", width)
        self.put(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        if is_decoder:
            self.put_norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            self.put_fused(f"{target}.encoder_attn", f"{source}/attention/linear_0", "q", width)
            self.put_fused(f"{target}.encoder_attn", f"{source}/attention/linear_1", "kv", width)
            self.put(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
        self.put_norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        self.put(f"{target}.fc1", f"{source}/ffn/linear_0")
        self.put(f"{target}.fc2", f"{source}/ffn/linear_1")


def convert_whisper(unpacked: Path, target: Path) -> None:
    """Write the Whisper in `unpacked` (model.bin, config.json, tokenizer.json) to `target` as a Hugging Face folder.

    Stored as float32: the published values are float16, so half the space would do, but a float16 folder loads as
    float16 by default, which is slow and inexact on a CPU.
    """
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    config, state = whisper_from_ctranslate2(read_ctranslate2(unpacked / "model.bin"))
    model = WhisperForConditionalGeneration(config)
    try:
        outcome = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise PartError(f"The Whisper tensors do not fit their own configuration ({error}).") from error
    if outcome.unexpected_keys or outcome.missing_keys != ["proj_out.weight"]:  # tied to the embeddings
        raise PartError(f"The Whisper tensors do not make a whole model: {outcome}.")
    model.tie_weights()
    _set_generation_config(model, unpacked / "config.json")
    model.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
    _write_tokenizer(unpacked / "tokenizer.json", target, config.max_target_positions)


def _set_generation_config(model, path: Path) -> None:
    """Carry over which tokens Whisper must not write, so that `generate` transcribes as published."""
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
        suppressed, at_start = list(published["suppress_ids"]), list(published["suppress_ids_begin"])
        heads = [list(pair) for pair in published["alignment_heads"]]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise PartError(f"{path} does not say which tokens Whisper suppresses ({error!r}). Fetch it again.") from error
    generation = model.generation_config
    generation.is_multilingual = False
    generation.return_timestamps = False
    generation.max_length = model.config.max_target_positions
    generation.no_timestamps_token_id = _NO_TIMESTAMPS
    generation.suppress_tokens = suppressed
    generation.begin_suppress_tokens = at_start
    generation.alignment_heads = heads


def _write_tokenizer(tokenizer_file: Path, target: Path, max_length: int) -> None:
    """Write the tokenizer so that AutoTokenizer and WhisperProcessor find it."""
    from transformers import WhisperTokenizer

    shutil.copyfile(tokenizer_file, target / "tokenizer.json")
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "WhisperTokenizer", "model_max_length": max_length, "pad_token": end}
    settings |= {"bos_token": end, "eos_token": end, "unk_token": end}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    WhisperTokenizer.from_pretrained(target).save_pretrained(target)
