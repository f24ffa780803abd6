"""LLaMA-family decoders (Llama, Mistral, Qwen2, Qwen3, SmolLM, Phi-3, InternLM2, ...) as our dense decoder.

A checkpoint is recognised by its structure, that is by the names and shapes of its tensors, not by its name: what is
there decides whether q, k and v have biases or norms. Tensors that a family fuses or names otherwise are looked at
through `fused_layouts`; shapes and names here are those that it gives. What tensors cannot show (a multiplier, a layer
without RoPE) is in the configuration; a field that changes the function in a way that our decoder lacks is refused by
name.
"""

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from .decoder_fields import DECODER_FIELDS
from .fused_layouts import AttentionSizes, Shapes, unfused_parts

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_SOURCE_PREFIX, _OUR_PREFIX = "model.", "model.language_model."
_LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTER_KEYS = {EMBEDDING, "model.norm.weight", HEAD}
_LAYER_KEYS = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
_QKV_BIASES = {f"self_attn.{name}_proj.bias" for name in "qkv"}
_OUTPUT_BIAS = "self_attn.o_proj.bias"
_HEAD_NORMS = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}

# Tensors that old checkpoints hold although the configuration determines them.
_RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$|self_attn\.(masked_bias|bias)$")

# Structures that look close but are something else; the first match in this order is named.
_OTHER_STRUCTURES = (
    (r"transformer\.h\.|gpt_neox|\.mlp\.(fc1|fc2|c_fc|dense_h_to_4h)", "it is no LLaMA-family decoder (GPT style)"),
    (r"\.(block_sparse_moe|mlp\.experts|feed_forward\.experts)\.", "it is a mixture of experts already"),
    (r"\.self_attn\.(kv_a_proj|q_a_proj|kv_b_proj)", "its attention compresses keys and values (DeepSeek)"),
    (r"(pre|post)_feedforward_layernorm|post_self_attn_layernorm|post_mlp_layernorm", "it has further norms (Gemma)"),
    (r"layernorm\.bias$|\.norm\.bias$", "its norms have biases, so they are no RMS norms"),
    (r"\.mlp\.\w+_proj\.bias$", "its feed-forward networks have biases"),
    (r"vision|visual|image_|multi_modal", "it holds a vision part, and no decoder beside it is found"),
)

# Families with LLaMA's tensor names but other arithmetic, none of it visible in names, shapes or single fields.
_OTHER_ARITHMETIC = {
    "gemma": "its norms add one to their weights and its embeddings are scaled",
    "minicpm": "it scales embeddings, residuals and logits",
    "glm": "it rotates pairs of neighbours",
    "glm4": "it rotates pairs of neighbours",
    "ernie4_5": "it rotates pairs of neighbours",
    "helium": "it rotates pairs of neighbours",
    "llama4_text": "it has layers without RoPE and scales attention",
    "olmo": "its norms have no weights and clip queries, keys and values",
}

# Configuration fields that change the function, and the values that mean "does nothing".
_NEUTRAL_FIELDS: dict[str, tuple[Any, ...]] = {
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "partial_rotary_factor": (None, 1),
    "mlp_bias": (None, False),
    "use_parallel_residual": (None, False),
    "parallel_attn": (None, False),
    "attention_chunk_size": (None,),
    "use_mup": (None, False),
    "resid_pdrop": (None, 0),
    "embd_pdrop": (None, 0),
}

# The types of RoPE that our decoder computes.
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def why_not(shapes: Shapes) -> str | None:
    """Why a checkpoint with these tensors, in their parts, is no decoder that we can read, or None when it is one."""
    if reason := other_structure(shapes):
        return reason
    if EMBEDDING not in shapes:
        return f"{EMBEDDING} is missing"
    layers = _layers(shapes)
    if sorted(layers) != list(range(len(layers))) or not layers:
        return f"its layers are numbered {sorted(layers)}; 0, 1, 2, ... is needed"
    optional = _optional_keys(layers[0])
    for index, names in sorted(layers.items()):
        missing = sorted((_LAYER_KEYS | optional) - names)
        unknown = sorted(names - _LAYER_KEYS - optional)
        if missing:
            return f"model.layers.{index}.{missing[0]} is missing"
        if unknown:
            return f"model.layers.{index}.{unknown[0]} has no counterpart in our decoder"
    unknown = [n for n in shapes if n not in _OUTER_KEYS and not _LAYER_KEY.match(n) and not _RECOMPUTED.search(n)]
    return f"{sorted(unknown)[0]} has no counterpart in our decoder" if unknown else None


def text_config_from(hf_config: PreTrainedConfig, shapes: Shapes | None = None) -> UniMoeTextConfig:
    """Our dense decoder's configuration for a LLaMA-family one.

    Args:
        hf_config: the configuration as transformers reads it, e.g. `LlamaConfig`.
        shapes: names and shapes of the checkpoint's tensors as stored; None takes those of the class that transformers
            has for the configuration, without allocating them.

    Raises:
        ConversionError: the source is something else; the message says what and where it shows.
    """
    stored = expected_shapes(hf_config) if shapes is None else shapes
    reason = other_structure(stored)
    if reason is None:
        shapes = {name: part.shape(stored[part.stored]) for name, part in unfused_parts(stored, hf_config).items()}
        reason = why_not(shapes) or _why_not_config(hf_config) or _why_not_shapes(hf_config, shapes)
    if reason is not None:
        raise ConversionError(
            f"This {hf_config.model_type!r} model cannot become our decoder: {reason}. "
            "Use a dense model of the LLaMA family (Llama, Mistral, Qwen2, Qwen3, SmolLM, Phi-3, InternLM2)."
        )
    names = _layers(shapes)[0]
    return UniMoeTextConfig(
        **{field: getattr(hf_config, field) for field in _SHARED_FIELDS if hasattr(hf_config, field)},
        rope_parameters=dict(hf_config.rope_parameters),
        sliding_window=_sliding_window(hf_config),
        attention_bias=names >= _QKV_BIASES,
        attention_output_bias=_OUTPUT_BIAS in names,
        use_qk_norm=names >= _HEAD_NORMS,
        num_experts=0,
        sparse_layers=[],
        num_experts_per_tok=1,
    )


_SHARED_FIELDS = (*DECODER_FIELDS, "vocab_size", "head_dim", "tie_word_embeddings", "attention_dropout")


def our_key(source_key: str) -> str | None:
    """Name of a source tensor in our layout; None when our configuration determines the tensor."""
    if _RECOMPUTED.search(source_key):
        return None
    if source_key == HEAD:
        return HEAD
    return _OUR_PREFIX + source_key.removeprefix(_SOURCE_PREFIX)


def expected_shapes(hf_config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers' own causal LM class for this configuration has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def other_structure(shapes: Shapes) -> str | None:
    """The tensor that shows another architecture, and which; None where there is none."""
    for pattern, reason in _OTHER_STRUCTURES:
        match = next((name for name in sorted(shapes) if re.search(pattern, name)), None)
        if match is not None:
            return f"{reason}: it holds {match}"
    return None


def _layers(shapes: Shapes) -> dict[int, set[str]]:
    layers: dict[int, set[str]] = {}
    for name in shapes:
        match = _LAYER_KEY.match(name)
        if match and not _RECOMPUTED.search(name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    return layers


def _optional_keys(names: set[str]) -> set[str]:
    """The optional tensors that a layer has, completed: one bias asks for all three, one norm for both."""
    optional: set[str] = set()
    for group in (_QKV_BIASES, {_OUTPUT_BIAS}, _HEAD_NORMS):
        if names & group:
            optional |= group
    return optional


def _why_not_config(config: PreTrainedConfig) -> str | None:
    if config.model_type in _OTHER_ARITHMETIC:
        return _OTHER_ARITHMETIC[config.model_type]
    for field, neutral in _NEUTRAL_FIELDS.items():
        value = getattr(config, field, None)
        if value not in neutral:
            return f"its configuration sets {field}={value!r}, which our decoder lacks"
    scale = getattr(config, "attention_multiplier", None)
    if scale is not None and abs(scale - AttentionSizes.of(config).head_dim ** -0.5) > 1e-9:
        return f"its configuration sets attention_multiplier={scale!r}, which our decoder lacks"
    if not all(getattr(config, "no_rope_layers", None) or [1]):
        return "some of its layers have no RoPE (no_rope_layers)"
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_type" not in rope:
        return f"its rope_parameters are {rope!r}; one set for all layers is needed"
    if rope["rope_type"] not in _ROPE_TYPES:
        return f"its rope_parameters ask for rope_type={rope['rope_type']!r}; our decoder has {', '.join(_ROPE_TYPES)}"
    if rope.get("llama_4_scaling_beta"):
        return f"its queries grow with the position (llama_4_scaling_beta={rope['llama_4_scaling_beta']!r})"
    if rope.get("partial_rotary_factor", 1) != 1:
        return f"it rotates only a share of each head (partial_rotary_factor={rope['partial_rotary_factor']})"
    kinds = set((_has_field(config, "layer_types") and config.layer_types) or ["full_attention"])
    if len(kinds) != 1 or not kinds <= {"full_attention", "sliding_attention"}:
        return f"its layers attend in different ways ({sorted(kinds)})"
    return None


def _why_not_shapes(config: PreTrainedConfig, shapes: Shapes) -> str | None:
    """A tensor whose shape contradicts the configuration, or a head that is missing."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_attention_heads * head_dim, key_value_heads * head_dim
    expected = {
        EMBEDDING: (config.vocab_size, hidden),
        HEAD: (config.vocab_size, hidden),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if HEAD not in shapes and not config.tie_word_embeddings:
        return f"{HEAD} is missing and its configuration does not tie it to the embeddings"
    if len(_layers(shapes)) != config.num_hidden_layers:
        return f"it holds {len(_layers(shapes))} layers but its configuration says {config.num_hidden_layers}"
    for name, shape in shapes.items():
        match = _LAYER_KEY.match(name)
        wanted = expected.get(match[2] if match else name)
        if wanted is not None and tuple(shape) != wanted:
            return f"{name} has shape {list(shape)} but its configuration says {list(wanted)}"
    return None


def _sliding_window(config: PreTrainedConfig) -> int | None:
    """The window of every layer. Families with `layer_types` slide only where these say so.

    A family whose configuration has no such field ignores what a config.json says of it: LLaMA never slides, though
    checkpoints that were Mistral's before may still hold its window.
    """
    window = getattr(config, "sliding_window", None) if _has_field(config, "sliding_window") else None
    kinds = getattr(config, "layer_types", None) if _has_field(config, "layer_types") else None
    return window if not kinds or kinds[0] == "sliding_attention" else None


def _has_field(config: PreTrainedConfig, name: str) -> bool:
    """Whether the configuration's class knows a field; transformers keeps any other beside them, without effect."""
    return name in type(config).__dataclass_fields__


__all__ = ["Shapes", "expected_shapes", "other_structure", "our_key", "text_config_from", "why_not"]
