"""Which weights of a model are held in few bits when it is loaded, and how."""

from typing import TYPE_CHECKING

from .errors import ConfigurationError, MissingPackageError

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

KINDS = ("int8", "int4")
LIBRARIES = ("torchao", "bitsandbytes")

# The decoder's matrices. Routers, norms, embeddings, the head, connectors and mixers stay as they are: they are small, and
# what a router rounds another way goes to another expert.
_LAYER = r"(model\.)?language_model\.layers\.\d+\."
_LINEAR = _LAYER + r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_EXPERTS = _LAYER + r"mlp\.(shared_)?experts\.(gate_up|down)_proj"
_TOWERS = r"(model\.)?(vision|speech|audio)_tower\..*\.([qkv]_proj|out_proj|fc1|fc2)"


def quantization_config(
    kind: str, *, library: str = "torchao", towers: bool = False, group_size: int = 32
) -> "TorchAoConfig | BitsAndBytesConfig":
    """What `from_pretrained(folder, quantization_config=...)` takes for a model of ours.

    Args:
        kind: "int8", a scale for every row; or "int4", with torchao a scale and a lowest value for every group of a row.
        library: "torchao", on any device; or "bitsandbytes", LLM.int8() and NF4, on CUDA.
        towers: quantise the matrices of the encoders too.
        group_size: values that share a scale, of "int4" with torchao. Even.

    Raises:
        ConfigurationError: one of them is something else.
        MissingPackageError: the library is not installed.
    """
    if kind not in KINDS or library not in LIBRARIES:
        raise ConfigurationError(
            f"Weights can be held in {' or '.join(KINDS)} by {' or '.join(LIBRARIES)}, not in {kind!r} by {library!r}."
        )
    if group_size < 2 or group_size % 2:
        raise ConfigurationError(f"group_size is {group_size}; it must be even and at least 2.")
    from transformers.utils import is_bitsandbytes_available, is_torchao_available

    if not (is_torchao_available() if library == "torchao" else is_bitsandbytes_available()):
        raise MissingPackageError(f"Loading in {kind} needs {library}: pip install 'unimoe[quantize]'.")
    return _torchao(kind, towers, group_size) if library == "torchao" else _bitsandbytes(kind, towers)


def _torchao(kind: str, towers: bool, group_size: int) -> "TorchAoConfig":
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    from .modeling_unimoe.packed_int4_unimoe import PackedInt4Config

    how: AOBaseConfig = (
        Int8WeightOnlyConfig(set_inductor_config=False) if kind == "int8" else PackedInt4Config(group_size)
    )
    # Names of parameters, since for a module's name transformers has its bias quantised too.
    linear = f"re:({_LINEAR}|{_TOWERS})\\.weight" if towers else f"re:{_LINEAR}\\.weight"
    return TorchAoConfig(FqnToConfig({linear: how, f"re:{_EXPERTS}": how}))


def _bitsandbytes(kind: str, towers: bool) -> "BitsAndBytesConfig":
    import torch
    from transformers import BitsAndBytesConfig

    linear = "|".join([_LINEAR, f"{_EXPERTS}\\.\\d+", *([_TOWERS] if towers else [])])
    everything_else = [f"(?!({linear})$).*"]  # one pattern: it is matched from a name's start
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=everything_else)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=everything_else,
    )


__all__ = ["KINDS", "LIBRARIES", "quantization_config"]
