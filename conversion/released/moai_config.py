"""The configuration of a MoAI checkpoint as ours, and back.

The original's config.json describes its language model; the sizes of everything else are constants of its code. Most of
them show in the tensors. Those that do not are taken from config.json where a model of other sizes has them there, under
`vision_config`, `mixer`, `compressor` and `plora`, else they are the code's.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig, UniMoeConnectorConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.key_rules import Shape
from ..dense.decoder_fields import DECODER_FIELDS
from ..dense.fused_layouts import internlm2_config
from .moai_keys import EMBEDDING, HEAD, VISION_TOWER, MoaiSizes

_MIXER = re.compile(r"model\.layers\.(\d+)\.attention\.moai_SA_img\.linear_q\.0\.weight")
_FIRST_PLORA = "model.layers.0.attention.wqkv.Plora_A.weight"
_COMPRESSOR = "moai_compressor."
# Constants of the original's code.
MIXER_HEADS = COMPRESSOR_HEADS = 4
PLORA_DROPOUT = 0.05
IMAGE_SIZE = 490
_CLIP_HEAD_SIZE = 64


def is_moai(shapes: Mapping[str, Shape]) -> bool:
    """Whether these are tensors of MoAI's code."""
    return _COMPRESSOR + "latents" in shapes and any(_MIXER.fullmatch(name) for name in shapes)


def moai_sizes(text: UniMoeTextConfig, embeddings: int) -> MoaiSizes:
    """The sizes that the rules need; `embeddings` are the rows of the original's table."""
    return MoaiSizes(text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.vocab_size, embeddings)


def our_moai_config(
    original: Mapping[str, Any], shapes: Mapping[str, Shape], image_token_id: int | None = None
) -> UniMoeConfig:
    """Our configuration of a MoAI checkpoint.

    Args:
        original: its config.json.
        shapes: its tensors.
        image_token_id: of the placeholder; None: the id behind the vocabulary, as in the original.

    Raises:
        ConversionError: a tensor is missing, or a field has a value that our decoder cannot compute.
    """
    for name in (HEAD, EMBEDDING, _FIRST_PLORA, "vision_proj.0.weight", VISION_TOWER + "embeddings.class_embedding"):
        if name not in shapes:
            raise ConversionError(f"{name} is missing: the checkpoint is not complete. Fetch all of its files.")
    text = _text_config(original, shapes)
    return UniMoeConfig(
        text_config=text,
        vision_config=_vision_config(original, shapes),
        image_connector=UniMoeConnectorConfig(
            type="mlp", depth=2, input_size=shapes["vision_proj.0.weight"][1], output_size=text.hidden_size
        ),
        image_token_id=text.vocab_size if image_token_id is None else image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="patch",
    )


def original_moai_config(config: UniMoeConfig, dtype: str) -> dict[str, Any]:
    """The config.json that the original reads, with the sizes that its code has as constants beside."""
    text, vision = config.text_config, config.vision_config
    mixer, plora = text.mixer_config, text.plora_config
    rope = text.rope_parameters
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {"type": rope["rope_type"], "factor": rope.get("factor", 1.0)}
    return {
        **{name: getattr(text, name) for name in DECODER_FIELDS},
        "model_type": "internlm",
        "vocab_size": text.vocab_size,
        "bias": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "tie_word_embeddings": False,
        "img_size": vision.image_size,
        "max_length": 4096,
        "use_cache": False,
        "torch_dtype": dtype,
        "vision_config": {
            name: getattr(vision, name) for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")
        },
        "mixer": {"heads": mixer.num_heads},
        "compressor": {"heads": mixer.compressor_heads},
        "plora": {"alpha": plora.alpha, "dropout": plora.dropout},
    }


def _text_config(original: Mapping[str, Any], shapes: Mapping[str, Shape]) -> UniMoeTextConfig:
    if original.get("bias") or original.get("tie_word_embeddings"):
        raise ConversionError("config.json has biases or tied embeddings, which MoAI's language model does not have.")
    llama = internlm2_config({**original, "bias": False})
    fields = {name: getattr(llama, name) for name in DECODER_FIELDS if name != "pad_token_id"}
    vocabulary, pad = shapes[HEAD][0], original.get("pad_token_id")
    if shapes[EMBEDDING][0] not in (vocabulary, vocabulary + 1):
        raise ConversionError(
            f"{EMBEDDING} has {shapes[EMBEDDING][0]} rows and {HEAD} {vocabulary}; one row more, for <image>, is what "
            "MoAI's models have. The files do not belong together."
        )
    return UniMoeTextConfig(
        **fields,
        vocab_size=vocabulary,
        pad_token_id=pad if pad is not None and 0 <= pad < vocabulary else None,  # the running original has -100
        rope_parameters=dict(llama.rope_parameters),
        mixer_config=_mixer_fields(original, shapes),
        plora_config=_plora_fields(original, shapes),
        num_experts=0,
        sparse_layers=[],
        num_experts_per_tok=1,
    )


def _mixer_fields(original: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    layers = sorted(int(match[1]) for name in shapes if (match := _MIXER.fullmatch(name)))
    depth = _count(shapes, re.escape(_COMPRESSOR) + r"layers\.(\d+)\.0\.to_q\.weight")
    heads = _constant(original, "compressor", "heads", COMPRESSOR_HEADS)
    inner = _rows(shapes, _COMPRESSOR + "layers.0.0.to_q.weight")
    if inner % heads:
        raise ConversionError(f"The compressor's queries have {inner} rows, which {heads} heads do not divide.")
    return {
        "layers": layers,
        "rank": _rows(shapes, f"model.layers.{layers[0]}.attention.moai_SA_img.linear_q.0.weight"),
        "num_heads": _constant(original, "mixer", "heads", MIXER_HEADS),
        "num_latents": _rows(shapes, _COMPRESSOR + "latents"),
        "compressor_depth": depth,
        "compressor_heads": heads,
        "compressor_head_dim": inner // heads,
        "compressor_ffn_size": _rows(shapes, _COMPRESSOR + "layers.0.1.1.weight"),
    }


def _plora_fields(original: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    rank = _rows(shapes, _FIRST_PLORA)
    return {
        "rank": rank,
        "alpha": _constant(original, "plora", "alpha", rank),
        "dropout": _constant(original, "plora", "dropout", PLORA_DROPOUT),
    }


def _vision_config(original: Mapping[str, Any], shapes: Mapping[str, Shape]) -> CLIPVisionConfig:
    patches = shapes.get(VISION_TOWER + "embeddings.patch_embedding.weight", ())
    if len(patches) != 4:
        raise ConversionError(
            f"{VISION_TOWER}embeddings.patch_embedding.weight is missing. Fetch the checkpoint again."
        )
    hidden = patches[0]
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=_rows(shapes, VISION_TOWER + "encoder.layers.0.mlp.fc1.weight"),
        num_hidden_layers=_count(shapes, re.escape(VISION_TOWER) + r"encoder\.layers\.(\d+)\.mlp\.fc1\.weight"),
        num_attention_heads=_constant(
            original, "vision_config", "num_attention_heads", max(1, hidden // _CLIP_HEAD_SIZE)
        ),
        image_size=original.get("img_size", IMAGE_SIZE),
        patch_size=patches[2],
        hidden_act=_constant(original, "vision_config", "hidden_act", "quick_gelu"),
        layer_norm_eps=_constant(original, "vision_config", "layer_norm_eps", 1e-5),
        projection_dim=hidden,
    )


def _constant(original: Mapping[str, Any], section: str, name: str, default: Any) -> Any:
    given = original.get(section)
    return given.get(name, default) if isinstance(given, Mapping) else default


def _rows(shapes: Mapping[str, Shape], name: str) -> int:
    if not shapes.get(name):
        raise ConversionError(f"{name} is missing: the checkpoint is not complete. Fetch all of its files.")
    return shapes[name][0]


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many layers have a tensor of this name."""
    numbers = {int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name))}
    return 1 + max(numbers, default=-1)


__all__ = ["IMAGE_SIZE", "is_moai", "moai_sizes", "original_moai_config", "our_moai_config"]
