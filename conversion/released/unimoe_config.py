"""The configuration of a released Uni-MoE model as ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, WhisperConfig

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig, UniMoeConnectorConfig
from ...modeling_unimoe.configuration_unimoe_beats import UniMoeBeatsConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.checkpoint_reader import dtype_name
from ..checkpoints.key_rules import Shape
from ..checkpoints.llava_keys import PROJECTOR
from ..dense.connector_fields import QFORMER_FIELDS, QUERY_DECODER_FIELDS
from ..dense.prepared_tokenizers import PLACEHOLDERS
from .unimoe_keys import ALIGNER
from .unimoe_variant import Variant

VIDEO_FRAMES = 8
# Fields of the original's configuration, a LlamaConfig with extras, and LlamaConfig's values where they are absent.
_DECODER_FIELDS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_BLIP2_HIDDEN, _BLIP2_HEADS = 768, 12
# Our name of a modality -> the field of the 8-expert variant that lists the experts its tokens shall prefer.
MODALITY_EXPERTS = {
    "image": "image_expert_indices",
    "speech": "audio_expert_indices",
    "video": "video_expert_indices",
}


@dataclass(frozen=True)
class Encoders:
    """Configurations of the encoders. Of `whisper` and `beats` one is there, by the variant's audio side.

    `qformer` holds `Blip2QFormerConfig` fields; None reads them off the tensors, which is possible for the released
    size only, because tensors do not show the number of heads.
    """

    vision: CLIPVisionConfig
    whisper: WhisperConfig | None = None
    beats: UniMoeBeatsConfig | None = None
    qformer: Mapping[str, Any] | None = None


def our_config(
    original: Mapping[str, Any],
    variant: Variant,
    encoders: Encoders,
    shapes: Mapping[str, Shape],
    placeholder_ids: Mapping[str, int] | None = None,
) -> UniMoeConfig:
    """Our configuration of a released model.

    Args:
        original: its config.json.
        shapes: its tensors, by original name.
        placeholder_ids: token ids of "image", "video", "audio" and "sound". None: those that follow the vocabulary;
            the embedding table does not grow, because placeholders are replaced before they are looked up.

    Raises:
        ConversionError: a field that the model cannot do without is missing or unknown.
    """
    text = _text_config(original, variant)
    ids = placeholder_ids or {name: text.vocab_size + i for i, name in enumerate(PLACEHOLDERS)}
    first = PROJECTOR + ("0.weight" if PROJECTOR + "0.weight" in shapes else "weight")
    speaks = variant.audio == "whisper"
    connector = _speech_connector if speaks else _sound_connector
    fields: dict[str, Any] = {f"{name}_token_id": ids[name] for name in PLACEHOLDERS}
    return UniMoeConfig(
        text_config=text,
        vision_config=encoders.vision,
        speech_config=encoders.whisper if speaks else None,
        audio_config=None if speaks else encoders.beats,
        image_connector=UniMoeConnectorConfig(
            type="mlp", depth=variant.projector_depth, input_size=shapes[first][1], output_size=text.hidden_size
        ),
        **connector(encoders, variant, shapes, text.hidden_size),
        **fields,
        vision_feature_layer=_required(original, "mm_vision_select_layer"),
        vision_feature_select_strategy=_select_strategy(original),
        video_pooling="mean",
        video_num_frames=VIDEO_FRAMES,
    )


def original_config(
    config: UniMoeConfig, vision_tower: str, audio_tower: str, image_aspect_ratio: str = "square"
) -> dict[str, Any]:
    """The config.json that the original's classes read; `our_config` gives the same model back.

    Args:
        vision_tower, audio_tower: where the original shall look for the encoders.
        image_aspect_ratio: of the model's processor.
    """
    text = config.text_config
    rope = text.rope_parameters
    scaled = rope["rope_type"] != "default"
    connector = config.speech_connector if config.speech_connector is not None else config.sound_connector
    strategies = {"patch": "patch", "full": "cls_patch"}
    return {
        **{name: getattr(text, name) for name in _DECODER_FIELDS},
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": rope["rope_type"], "factor": rope["factor"]} if scaled else None,
        "pretraining_tp": 1,
        "torch_dtype": dtype_name(config.dtype or torch.float32),
        "moe": True,
        "num_experts": text.num_experts,
        "num_experts_per_tok": text.num_experts_per_tok,
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": config.image_connector.input_size,
        "mm_projector_type": f"mlp{config.image_connector.depth}x_gelu"
        if config.image_connector.depth > 1
        else "linear",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": strategies[config.vision_feature_select_strategy],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "mm_audio_tower": audio_tower,
        "mm_audio_hidden_size": connector.input_size,
        "mm_audio_select_layer": 0,
        "mm_audio_select_feature": "patch",
        "audio_projector_type": "linear",
        "query_tokens_size": connector.num_tokens,
        "mm_query_tokens": True,
        "local_files_only": True,
        "language": "English",
        "task": "transcribe",
        "image_aspect_ratio": image_aspect_ratio,
    }


def _text_config(original: Mapping[str, Any], variant: Variant) -> UniMoeTextConfig:
    fields = {name: original.get(name, absent) for name, absent in _DECODER_FIELDS.items()}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(original.get("rope_theta", 10_000.0))}
    scaling = original.get("rope_scaling")
    if scaling is not None:
        if scaling.get("type") not in ("linear", "dynamic"):
            raise ConversionError(f"config.json has rope_scaling {scaling!r}; Uni-MoE knows 'linear' and 'dynamic'.")
        rope |= {"rope_type": scaling["type"], "factor": float(scaling["factor"])}
    return UniMoeTextConfig(
        **fields,
        rope_parameters=rope,
        num_experts=variant.num_experts,
        num_experts_per_tok=variant.num_experts_per_tok,
        sparse_layers=list(variant.sparse_layers),
        # Uni-MoE takes a softmax over the chosen logits: the same as one over all, divided by the chosen ones' sum.
        router_scoring="softmax",
        **(_eight_expert_routing(original, variant) if variant.layout == "deepspeed" else {"norm_topk_prob": True}),
    )


def preferred_experts(original: Mapping[str, Any], variant: Variant) -> dict[str, list[int]]:
    """The experts that each modality's tokens shall prefer; without the loss, only those that are there."""
    named = {name: list(original.get(field) or ()) for name, field in MODALITY_EXPERTS.items()}
    if original.get("aux_multimodal_loss"):
        return named
    return {name: [expert for expert in ids if expert in range(variant.num_experts)] for name, ids in named.items()}


def _eight_expert_routing(original: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    def coefficient(loss: str) -> float:
        return float(_required(original, f"{loss}_coef")) if original.get(loss) else 0.0

    return {
        "router_in_float32": True,
        # DeepSpeed divides by the sum of two weights, but leaves a single one as it is.
        "norm_topk_prob": variant.num_experts_per_tok > 1,
        "router_aux_loss_counts": "first",
        "modality_experts": {name: ids for name, ids in preferred_experts(original, variant).items() if ids} or None,
        "router_aux_loss_coef": coefficient("aux_balance_loss"),
        "router_modality_loss_coef": coefficient("aux_multimodal_loss"),
        "router_divergence_loss_coef": coefficient("aux_kl_loss"),
    }


def _speech_connector(
    encoders: Encoders, variant: Variant, shapes: Mapping[str, Shape], hidden_size: int
) -> dict[str, Any]:
    whisper = encoders.whisper
    if whisper is None:
        raise ConversionError("A speech model needs the configuration of its Whisper, but encoders.whisper is None.")
    return {
        "speech_connector": UniMoeConnectorConfig(
            type="query_decoder",
            input_size=whisper.d_model,
            output_size=hidden_size,
            num_tokens=shapes[variant.query_tokens][1],
            decoder_config={name: getattr(whisper, name) for name in QUERY_DECODER_FIELDS},
        )
    }


def _sound_connector(
    encoders: Encoders, variant: Variant, shapes: Mapping[str, Shape], hidden_size: int
) -> dict[str, Any]:
    if encoders.beats is None:
        raise ConversionError("The audio model needs the configuration of its BEATs, but encoders.beats is None.")
    given = encoders.qformer
    qformer = _qformer_of(shapes) if given is None else {name: given[name] for name in QFORMER_FIELDS if name in given}
    return {
        "sound_connector": UniMoeConnectorConfig(
            type="qformer",
            input_size=encoders.beats.hidden_size,
            output_size=hidden_size,
            num_tokens=shapes[variant.query_tokens][1],
            qformer_config=qformer,
        )
    }


def _qformer_of(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The Q-Former's configuration from its tensors; the original stores none and always takes BLIP-2's."""
    layer = ALIGNER + "qformer.qformer.encoder.layer."
    names = [name.removeprefix(layer).split(".") for name in shapes if name.startswith(layer)]
    numbers = {int(name[0]) for name in names}
    crossing = sorted({int(name[0]) for name in names if name[1] == "crossattention"})
    key = f"{layer}0.crossattention.attention.key.weight"
    inner = f"{layer}0.intermediate_query.dense.weight"
    if key not in shapes or inner not in shapes:
        raise ConversionError(f"{key if key not in shapes else inner} is missing: the Q-Former is not complete.")
    hidden, encoder_hidden = shapes[key]
    if hidden != _BLIP2_HIDDEN:
        raise ConversionError(
            f"The Q-Former is {hidden} wide, not {_BLIP2_HIDDEN} as BLIP-2's, and its tensors do not show how many heads "
            "it has: give its configuration (--qformer-config FILE.json)."
        )
    return {
        "hidden_size": hidden,
        "encoder_hidden_size": encoder_hidden,
        "num_hidden_layers": len(numbers),
        "num_attention_heads": _BLIP2_HEADS,
        "intermediate_size": shapes[inner][0],
        "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else len(numbers),
    }


def _select_strategy(original: Mapping[str, Any]) -> Any:
    feature = original.get("mm_vision_select_feature", "patch")
    strategies = {"patch": "patch", "cls_patch": "full"}
    if feature not in strategies:
        raise ConversionError(f"config.json has mm_vision_select_feature {feature!r}; Uni-MoE knows {[*strategies]}.")
    return strategies[feature]


def _required(original: Mapping[str, Any], field: str) -> Any:
    if original.get(field) is None:
        raise ConversionError(f"config.json lacks {field}, without which the model is not defined.")
    return original[field]
