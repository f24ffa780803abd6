"""The configuration of a MoIIE checkpoint as ours, and back."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig, UniMoeConnectorConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.checkpoint_reader import dtype_name
from ..checkpoints.key_rules import Shape
from ..checkpoints.llava_keys import PROJECTOR
from ..checkpoints.meta_model import first_line
from ..dense.decoder_fields import DECODER_FIELDS
from ..dense.fused_layouts import AttentionSizes
from .moiie_keys import GROUPED, Sizes
from .moiie_variant import MoiieVariant, model_type_of

SCALES = [1, 2, 3]
# Where the original is silent about a modality: what is seen goes with vision, what is heard with language.
MODALITY_GROUPS = {
    "text": "language",
    "image": "vision",
    "video": "vision",
    "speech": "language",
    "sound": "language",
}
_DECODER_FIELDS = (*DECODER_FIELDS, "vocab_size", "attention_dropout", "tie_word_embeddings")
# Our group -> field of the original, and the value that its classes use when a config.json lacks it.
_GROUP_COEFS = {"vision": "vis_router_aux_loss_coef", "language": "lan_router_aux_loss_coef"}
_ABSENT_COEFS = {"moiie": 0.001, "separate": 0.02, "vanilla": 0.001}


def sizes_of(text: UniMoeTextConfig) -> Sizes:
    """Rows of the tensors that Phi-3 fuses."""
    return Sizes(AttentionSizes.of(text), text.intermediate_size)


def our_text_config(original: Mapping[str, Any], variant: MoiieVariant) -> UniMoeTextConfig:
    """Our decoder's configuration of a MoIIE checkpoint.

    Raises:
        ConversionError: a field has a value that our decoder cannot compute.
    """
    backbone = _backbone_config(original, variant)
    fields = {name: getattr(backbone, name) for name in _DECODER_FIELDS}
    for name in ("attention_bias", "mlp_bias"):
        if original.get(name):
            raise ConversionError(f"config.json has {name} = {original[name]!r}; MoIIE's models have no biases there.")
    return UniMoeTextConfig(
        **fields,
        head_dim=backbone.hidden_size // backbone.num_attention_heads,
        rope_parameters=dict(backbone.rope_parameters),
        sliding_window=original.get("sliding_window") if variant.backbone == "phi3" else None,
        **_routing(original, variant),
    )


def our_moiie_config(
    original: Mapping[str, Any],
    variant: MoiieVariant,
    vision: PreTrainedConfig | None,
    shapes: Mapping[str, Shape],
    image_token_id: int | None = None,
) -> UniMoeConfig:
    """Our configuration of a MoIIE checkpoint.

    Args:
        original: its config.json.
        vision: the SigLIP tower; None for a language model alone.
        shapes: its tensors, by original name.
        image_token_id: of the placeholder. None: the id that follows the vocabulary; the embedding table does not grow,
            because placeholders are replaced before they are looked up.

    Raises:
        ConversionError: see `our_text_config`.
    """
    text = our_text_config(original, variant)
    fields: dict[str, Any] = {"route_run_end_as_text": variant.kind in GROUPED}
    if vision is None or not variant.projector_depth:
        return UniMoeConfig(text_config=text, **fields)
    first = PROJECTOR + ("0.weight" if PROJECTOR + "0.weight" in shapes else "weight")
    return UniMoeConfig(
        text_config=text,
        vision_config=vision,
        image_connector=UniMoeConnectorConfig(
            type="mlp", depth=variant.projector_depth, input_size=shapes[first][1], output_size=text.hidden_size
        ),
        image_token_id=text.vocab_size if image_token_id is None else image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        vision_scales=list(SCALES) if original.get("use_s2") else None,
        **fields,
    )


def original_moiie_config(
    config: UniMoeConfig, variant: MoiieVariant, vision_tower: str, aspect_ratio: str
) -> dict[str, Any]:
    """The config.json that the original's classes read; `our_moiie_config` gives the same model back.

    Args:
        vision_tower: where the original shall look for the tower; it chooses the tower's class by this name.
        aspect_ratio: "pad" or "square".
    """
    text = config.text_config
    model_type, architecture = model_type_of(variant.kind, variant.backbone)
    fields: dict[str, Any] = {
        **{name: getattr(text, name) for name in _DECODER_FIELDS},
        "model_type": model_type,
        "architectures": [architecture],
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": _rope_scaling(text),
        "attention_bias": False,
        "torch_dtype": dtype_name(config.dtype or "float32"),
        "use_cache": True,
        **_original_routing(text, variant),
    }
    if variant.backbone == "phi3":
        original_length = text.rope_parameters.get("original_max_position_embeddings", text.max_position_embeddings)
        fields |= {
            "sliding_window": text.sliding_window,
            "original_max_position_embeddings": original_length,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        }
    else:
        fields |= {"pretraining_tp": 1}
    if config.image_connector is None:
        return fields
    depth = config.image_connector.depth
    return fields | {
        "mm_vision_tower": vision_tower,
        "use_mm_proj": True,
        "mm_projector_type": f"mlp{depth}x_gelu" if depth > 1 else "linear",
        "mm_hidden_size": config.image_connector.input_size,
        "image_aspect_ratio": aspect_ratio,
        "mm_use_im_start_end": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": text.max_position_embeddings,
        "use_s2": config.vision_scales is not None,
        "unfreeze_vision_tower": True,  # the tower's weights count, and are not read from its own folder
    }


def _backbone_config(original: Mapping[str, Any], variant: MoiieVariant) -> Any:
    """The fields as transformers' own class of the backbone completes and names them."""
    config_class = Phi3Config if variant.backbone == "phi3" else LlamaConfig
    names = {*_DECODER_FIELDS, "rope_theta", "rope_scaling", "original_max_position_embeddings"}
    given = {name: original[name] for name in names if name in original}
    try:
        return config_class(**given)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ConversionError(
            f"config.json describes no {config_class.__name__} ({first_line(error)}). Correct it."
        ) from error


def _routing(original: Mapping[str, Any], variant: MoiieVariant) -> dict[str, Any]:
    if variant.pools is None:
        return {"num_experts": 0, "sparse_layers": [], "num_experts_per_tok": 1}
    routing: dict[str, Any] = {
        "num_experts": variant.pools.num_experts,
        "num_experts_per_tok": variant.num_experts_per_tok,
        "sparse_layers": list(variant.sparse_layers),
        "router_scoring": "softmax",
        "norm_topk_prob": True,
    }
    if variant.kind != "vanilla":
        routing["expert_groups"] = {"language": [*variant.pools.language], "vision": [*variant.pools.vision]}
        routing["modality_groups"] = dict(MODALITY_GROUPS)
    if variant.kind == "modality":
        return routing
    jitter = float(original.get("router_jitter_noise") or 0.0)
    routing |= {
        "router_aux_loss_layers": "joint",
        "router_jitter_noise": jitter,
        "router_jitter_reaches_experts": True,
    }
    # An even load costs the original k, and ours 1.
    scale, absent = variant.num_experts_per_tok, _ABSENT_COEFS[variant.kind]
    if variant.kind == "vanilla":
        return routing | {"router_aux_loss_coef": scale * float(original.get("router_aux_loss_coef", absent))}
    coefs = {group: scale * float(original.get(field, absent)) for group, field in _GROUP_COEFS.items()}
    return routing | {"router_group_aux_loss_coefs": coefs}


def _original_routing(text: UniMoeTextConfig, variant: MoiieVariant) -> dict[str, Any]:
    if variant.pools is None or variant.kind == "modality":
        return {}
    routing: dict[str, Any] = {
        "num_experts_per_tok": text.num_experts_per_tok,
        # Its classes read this field and give it no value of their own.
        "router_jitter_noise": float(text.router_jitter_noise),
    }
    coefs = {
        group.name: c / text.num_experts_per_tok
        for group, c in zip(text.router_groups, text.aux_loss_coefs, strict=True)
    }
    if variant.kind == "vanilla":
        coefficient = next(iter(coefs.values()))
        return routing | {
            "num_experts": text.num_experts,
            "router_aux_loss_coef": coefficient,
            "output_router_logits": True,
        }
    routing |= {field: coefs[group] for group, field in _GROUP_COEFS.items()}
    routing |= {"output_vis_router_logits": True, "output_lan_router_logits": True}
    if variant.kind == "separate":
        return routing | {"num_vis_experts": len(variant.pools.vision), "num_lan_experts": len(variant.pools.language)}
    return routing | {"num_experts": variant.pools.num_experts + len(variant.pools.unreached)}


def _rope_scaling(text: UniMoeTextConfig) -> dict[str, Any] | None:
    rope = text.rope_parameters
    if rope["rope_type"] == "default":
        return None
    kept = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta", "original_max_position_embeddings")}
    kept.pop("partial_rotary_factor", None)
    return {"type": rope["rope_type"], **kept}
