"""Decoders of the LLaMA family that store their tensors otherwise, as parts under LLaMA's names.

Phi-3       `self_attn.qkv_proj` holds the rows of q, k and v one after the other, `mlp.gate_up_proj` those of gate
            and up.
InternLM2   `attention.wqkv` holds, for every key-value head, the rows of the query heads that read it, then that
            head's key, then its value; everything has names of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from ...errors import ConversionError
from ..checkpoints.tensor_parts import Part, consecutive, interleaved
from .decoder_fields import DECODER_FIELDS

Shapes = Mapping[str, tuple[int, ...]]

# What Phi-3 fuses, below a layer -> LLaMA's names of its parts, in their order.
PHI3_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_PHI3 = re.compile(rf"(.+\.)({'|'.join(map(re.escape, PHI3_FUSED))})\.(weight|bias)")
_INTERNLM2_QKV = re.compile(r"(model\.layers\.\d+\.)attention\.wqkv\.(weight|bias)")
_INTERNLM2_NAMES = (
    (re.compile(r"model\.tok_embeddings\."), "model.embed_tokens."),
    (re.compile(r"output\."), "lm_head."),
    (re.compile(r"(model\.layers\.\d+\.)attention_norm\."), r"\1input_layernorm."),
    (re.compile(r"(model\.layers\.\d+\.)ffn_norm\."), r"\1post_attention_layernorm."),
    (re.compile(r"(model\.layers\.\d+\.)attention\.wo\."), r"\1self_attn.o_proj."),
    (re.compile(r"(model\.layers\.\d+\.)attention\.rotary_emb\."), r"\1self_attn.rotary_emb."),
    (re.compile(r"(model\.layers\.\d+\.)feed_forward\.w1\."), r"\1mlp.gate_proj."),
    (re.compile(r"(model\.layers\.\d+\.)feed_forward\.w3\."), r"\1mlp.up_proj."),
    (re.compile(r"(model\.layers\.\d+\.)feed_forward\.w2\."), r"\1mlp.down_proj."),
)
_INTERNLM2_SHARED_FIELDS = (
    *DECODER_FIELDS,
    "vocab_size",
    "use_cache",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
)


@dataclass(frozen=True)
class AttentionSizes:
    """What the rows of fused tensors follow from."""

    heads: int
    key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "AttentionSizes":
        """Those of a LLaMA-like configuration, ours or another's."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        key_value = self.key_value_heads * self.head_dim
        return self.heads * self.head_dim, key_value, key_value


def is_internlm2(shapes: Shapes) -> bool:
    return any(_INTERNLM2_QKV.fullmatch(name) for name in shapes)


def unfused_parts(shapes: Shapes, config: PreTrainedConfig) -> dict[str, Part]:
    """Every tensor of a checkpoint under LLaMA's name, fused ones in their parts; others keep their names.

    Args:
        shapes: names and shapes as stored.
        config: the source's configuration, for the numbers and sizes of its heads.

    Raises:
        ConversionError: a fused tensor has another number of rows than its parts.
    """
    parts: dict[str, Part] = {}
    sizes, internlm2 = AttentionSizes.of(config), is_internlm2(shapes)
    for stored, shape in shapes.items():
        if match := _PHI3.fullmatch(stored):
            names = [f"{match[1]}{name}.{match[3]}" for name in PHI3_FUSED[match[2]]]
            made = consecutive(stored, phi3_rows(match[2], sizes, config.intermediate_size))
        elif internlm2 and (match := _INTERNLM2_QKV.fullmatch(stored)):
            names = [f"{match[1]}self_attn.{name}_proj.{match[2]}" for name in "qkv"]
            made = internlm2_qkv(stored, sizes)
        else:
            names, made = [_renamed(stored) if internlm2 else stored], [Part(stored)]
        _require_all_rows(stored, shape, made)
        parts |= zip(names, made, strict=True)
    return parts


def phi3_rows(fused: str, sizes: AttentionSizes, intermediate: int) -> tuple[int, ...]:
    """Rows of the parts of one of `PHI3_FUSED`, which follow each other."""
    return sizes.qkv_rows if fused == "self_attn.qkv_proj" else (intermediate, intermediate)


def internlm2_qkv(stored: str, sizes: AttentionSizes) -> list[Part]:
    """q, k and v of a tensor in which they alternate: per key-value head its queries, its key and its value."""
    queries = sizes.heads // sizes.key_value_heads * sizes.head_dim
    return interleaved(stored, sizes.key_value_heads, (queries, sizes.head_dim, sizes.head_dim))


def internlm2_config(fields: Mapping[str, Any]) -> LlamaConfig:
    """InternLM2's config.json as LLaMA's: transformers has no class for it, and code of its own is not run."""
    known = {name: fields[name] for name in _INTERNLM2_SHARED_FIELDS if name in fields}
    return LlamaConfig(**known, attention_bias=bool(fields.get("bias", True)))


def _renamed(name: str) -> str:
    for pattern, ours in _INTERNLM2_NAMES:
        if pattern.match(name):
            return pattern.sub(ours, name, count=1)
    return name


def _require_all_rows(stored: str, shape: tuple[int, ...], parts: list[Part]) -> None:
    rows = sum(stop - start for part in parts for start, stop in part.rows)
    if rows and tuple(shape[:1]) != (rows,):
        raise ConversionError(
            f"{stored} has shape {list(shape)}, but the heads and sizes in config.json make {rows} rows of it. Weights "
            "and config.json do not belong together."
        )


__all__ = [
    "PHI3_FUSED",
    "AttentionSizes",
    "internlm2_config",
    "internlm2_qkv",
    "is_internlm2",
    "phi3_rows",
    "unfused_parts",
]
