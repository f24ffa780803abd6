"""Dense models that see and write (LLaVA, LLaVA-OneVision, Qwen2.5-VL and their like): what of them becomes ours.

The language part is found by its place among the tensor names. Where it is of the LLaMA family it is taken, and text gets
the same logits as in the source. The picture part is taken as well where our classes compute the same: one CLIP or
SigLIP tower, one of its layers, and an MLP with GELU (LLaVA 1.5). Otherwise it is left out, with the reason.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from ..checkpoints.llava_keys import vision_prefix
from .fused_layouts import Shapes

# Where the decoder and the head lie: today's names, those of older files, and Qwen2-VL's older ones.
_PLACES = (
    (re.compile(r"model\.language_model\.(.+)"), "lm_head.weight"),
    (re.compile(r"language_model\.model\.(.+)"), "language_model.lm_head.weight"),
    (re.compile(r"model\.((?:layers|embed_tokens|norm)\..+)"), "lm_head.weight"),
)
_PICTURES = re.compile(
    r"(?:model\.)?(visual|vision_tower|vision_model|multi_modal_projector|image_newline|mm_projector)\b"
)
_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)")
_PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.linear_([12])\.(weight|bias)")
_TOWERS = ("clip_vision_model", "siglip_vision_model")
_OTHER_KINDS = {
    "qwen2_vl": "its tower reads pictures of any size, and their tokens have positions in three axes",
    "qwen2_5_vl": "its tower reads pictures of any size, and their tokens have positions in three axes",
    "llava_next": "it cuts pictures into tiles and marks their lines",
    "llava_onevision": "it cuts pictures into tiles and marks their lines",
    "llama": "it lies in the layout of LLaVA's own code; `unimoe convert compose` puts its projector behind a tower",
}
# What LLaVA's own code writes into config.json, the decoder's fields beside it. transformers' class of that name would
# take none of them and describe some other decoder.
_LLAVA_OWN = ("llava", "llava_llama")


@dataclass(frozen=True)
class LanguagePart:
    """The decoder inside a multimodal model.

    Args:
        names: LLaMA's name of each of its tensors -> the name as stored.
        others: the stored names of all else.
    """

    names: Mapping[str, str]
    others: tuple[str, ...]


@dataclass(frozen=True)
class PicturePart:
    """The tower and projector of a multimodal model: `UniMoeConfig` fields, and our tensor names -> as stored.

    `dropped`: stored names that are not taken -> why.
    """

    fields: Mapping[str, Any]
    names: Mapping[str, str]
    dropped: Mapping[str, str]


def language_part(shapes: Shapes) -> LanguagePart | None:
    """The decoder of a multimodal checkpoint; None when it holds no picture part."""
    if not any(_PICTURES.match(name) for name in shapes):
        return None
    for place, head in _PLACES:
        names = {f"model.{match[1]}": name for name in shapes if (match := place.fullmatch(name))}
        if any(".layers." in name for name in names):
            if head in shapes:
                names["lm_head.weight"] = head
            taken = set(names.values())
            return LanguagePart(names, tuple(name for name in shapes if name not in taken))
    return None


def llava_own_config(fields: Mapping[str, Any]) -> LlamaConfig | None:
    """The decoder of a config.json that LLaVA's own code wrote; None for any other."""
    if fields.get("model_type") not in _LLAVA_OWN or "text_config" in fields or "hidden_size" not in fields:
        return None
    return LlamaConfig.from_dict({**fields, "model_type": LlamaConfig.model_type})


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's part of a multimodal configuration.

    Positions in three axes (Qwen2-VL) are alike on text, so that there they are plain RoPE.
    """
    text = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict):
        text.rope_parameters = {name: value for name, value in rope.items() if name != "mrope_section"}
    return text


def picture_part(config: PreTrainedConfig, others: Iterable[str]) -> PicturePart | str:
    """The picture part in our terms, or why our classes do not compute the same.

    Args:
        config: the multimodal configuration.
        others: stored names of the tensors outside the language part.
    """
    if config.model_type != "llava":
        return _OTHER_KINDS.get(config.model_type, f"a picture part of type {config.model_type!r} is not known here")
    vision = config.vision_config
    if vision.model_type not in _TOWERS:
        return f"its tower is of type {vision.model_type!r}; {' or '.join(_TOWERS)} is needed"
    if not isinstance(config.vision_feature_layer, int):
        return f"it joins the states of several layers ({config.vision_feature_layer})"
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        return "its projector has another activation than GELU, or no biases"
    names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for stored in others:
        if match := _PROJECTOR.fullmatch(stored):
            names[f"model.image_connector.layers.{int(match[1]) - 1}.{match[2]}"] = stored
        elif match := _TOWER.fullmatch(stored):
            if match[1] == "embeddings.position_ids":
                dropped[stored] = "computed from the configuration: 0, 1, 2, ..."
            else:
                names[f"vision:{match[1]}"] = stored
        else:
            return f"it holds {stored}, which is no part of a tower or a projector of two layers"
    fields = {
        "vision_config": {**vision.to_dict(), "_name_or_path": ""},
        "image_connector": {"type": "mlp", "depth": 2, "input_size": vision.hidden_size},
        "image_token_id": config.image_token_id,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "full" if config.vision_feature_select_strategy == "full" else "patch",
    }
    return PicturePart(fields, names, dropped)


def with_tower_names(names: Mapping[str, str], our_names: Iterable[str]) -> dict[str, str]:
    """The names of a `PicturePart` as this release of transformers has them inside our model."""
    prefix = vision_prefix(our_names)
    return {re.sub(r"^vision:", prefix, name): stored for name, stored in names.items()}


def special_token_ids(config: PreTrainedConfig) -> list[int]:
    """Ids that stand for media or mark them, which random texts must not hold."""
    found = (getattr(config, name, None) for name in vars(config) if name.endswith(("_token_id", "_token_index")))
    inside = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return sorted({value for value in (*found, *inside) if isinstance(value, int) and value >= 0})


__all__ = [
    "LanguagePart",
    "PicturePart",
    "language_part",
    "llava_own_config",
    "picture_part",
    "special_token_ids",
    "text_config_of",
    "with_tower_names",
]
