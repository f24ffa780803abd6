"""Our models of golden MoAI cases, and the original's batches as ours."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from golden import GoldenCase

from unimoe import UniMoeConfig, UniMoeForCausalLM
from unimoe.conversion.checkpoints.key_rules import KeyMap
from unimoe.conversion.checkpoints.llava_keys import vision_prefix
from unimoe.conversion.checkpoints.our_folder import expected_tensors
from unimoe.conversion.released.moai_config import is_moai as holds_moai
from unimoe.conversion.released.moai_config import moai_sizes, our_moai_config
from unimoe.conversion.released.moai_keys import EMBEDDING, moai_rules

# What the released code does and ours does not by default.
AS_RELEASED = {
    "gate_precision": "float16",
    "gate_training_precision": "bfloat16",
    "compress_aux_padding": True,
}


# What a batch is made of, besides its pictures, its aux and the mask of its language.
_INPUTS = ("input_ids", "attention_mask", "im_mask")
_RAW_AUX = ("verb_input_ids", "panoptic_index_map")


def is_moai(case: GoldenCase) -> bool:
    """Whether a case holds MoAI's weights and the config that they are read with."""
    weights = case.names("*", "weights")
    return bool(weights) and holds_moai(dict.fromkeys(weights, ())) and "original_config" in case.config


@dataclass(frozen=True)
class Converted:
    config: UniMoeConfig
    state: dict[str, torch.Tensor]
    key_map: KeyMap


def original_config(case: GoldenCase) -> dict[str, Any]:
    """The config.json of a checkpoint of these sizes."""
    constants = {name: case.config[name] for name in ("vision_config", "plora", "mixer", "compressor")}
    return {**case.config["original_config"], "pad_token_id": case.config["checkpoint_pad_token_id"], **constants}


@lru_cache(maxsize=4)
def converted(path: Path) -> Converted:
    case = GoldenCase(path, ledger=None)
    shapes = {name: tuple(tensor.shape) for name, tensor in case.weights.items()}
    config = our_moai_config(original_config(case), shapes)
    sizes = moai_sizes(config.text_config, shapes[EMBEDDING][0])
    key_map = KeyMap(moai_rules(sizes, vision_prefix(expected_tensors(config))))
    return Converted(config, key_map.convert(case.weights), key_map)


def moai_model(case: GoldenCase, **mixer: Any) -> UniMoeForCausalLM:
    """Our model with the golden weights in float32, fresh.

    Args:
        mixer: fields of the mixers' configuration, over `AS_RELEASED`.
    """
    whole = converted(case.path)
    given = {k: v for k, v in whole.config.to_dict().items() if k != "model_type"}
    text = dict(given["text_config"])
    text["mixer_config"] = {**text["mixer_config"], **AS_RELEASED, **mixer}
    text["plora_config"] = {**text["plora_config"], "dropout": 0.0}
    model = UniMoeForCausalLM(UniMoeConfig(**{**given, "text_config": text}))
    model.load_state_dict(whole.state)
    return model.eval()


def expand_images(case: GoldenCase, ids: torch.Tensor) -> torch.Tensor:
    """Ids with the image's placeholder once per feature."""
    image, count = case.config["image_token_index"], case.config["image_tokens"]
    return torch.stack([row.repeat_interleave(torch.where(row == image, count, 1)) for row in ids])


def normalised(case: GoldenCase, values: torch.Tensor) -> torch.Tensor:
    """Pixels [n, 3, H, W] of values that are taken for 0..255, whatever they are."""
    mean, std = (torch.tensor(case.config[f"image_{name}"])[:, None, None] * 255 for name in ("mean", "std"))
    return (values.float() - mean) / std


def segment_colours(numbers: torch.Tensor) -> torch.Tensor:
    """[n, 3, H, W] values of 0..1: PASCAL VOC's colour of every segment's number."""
    colours = torch.zeros(3, *numbers.shape, dtype=torch.long)
    for bit in range(24):
        colours[bit % 3] |= ((numbers.long() >> bit) & 1) << (7 - bit // 3)
    return colours.transpose(0, 1) / 255


@dataclass
class Batch:
    """An original batch as inputs of ours; `image_mask` and `language_mask` [B, S] are the original's."""

    inputs: dict[str, torch.Tensor]
    image_mask: torch.Tensor
    language_mask: torch.Tensor

    @property
    def attended(self) -> torch.Tensor:
        return self.inputs["attention_mask"].bool()


def batch_of(name: str) -> str:
    """The batch that a tensor belongs to: "eval_b1" of "eval_b1/layer0/output"."""
    return name.partition("/")[0]


def batches(case: GoldenCase, language: str = "lang_mask") -> list[str]:
    """The batches of a case that hold all inputs of the model."""
    return [name for name in map(batch_of, case.names(f"*/{language}")) if has_inputs(case, name, language)]


def has_inputs(case: GoldenCase, name: str, language: str) -> bool:
    has_pictures = case.has(f"{name}/images_uint8") or case.has(f"{name}/pixel_values")
    has_aux = has_raw_aux(case, name) or case.has(f"{name}/aux_embeds")
    return has_pictures and has_aux and case.has(*(f"{name}/{part}" for part in (*_INPUTS, language)))


def has_raw_aux(case: GoldenCase, name: str) -> bool:
    """Whether a batch holds aux texts and maps, so that their embeddings are a result and not an input."""
    return case.has(*(f"{name}/{part}" for part in _RAW_AUX))


def moai_batch(case: GoldenCase, name: str, language: str = "lang_mask") -> Batch:
    """The inputs `{name}/*`, from raw pictures, text and map where there are any, else from what they become."""
    ids = case.input(f"{name}/input_ids")
    image_mask, language_mask = case.input(f"{name}/im_mask"), case.input(f"{name}/{language}")
    expanded = expand_images(case, ids)
    # One token stands for the image in the mask of the text.
    row = case.input(f"{name}/attention_mask")
    mask = torch.stack(
        [
            kept.repeat_interleave(
                torch.where(own == case.config["image_token_index"], case.config["image_tokens"], 1)
            )
            for own, kept in zip(ids, row, strict=True)
        ]
    )
    if case.has(f"{name}/images_uint8"):
        pixels = normalised(case, case.input(f"{name}/images_uint8"))
        case.check_if_present(f"{name}/pixel_values", pixels)
    else:
        pixels = case.input(f"{name}/pixel_values")
    inputs = {
        "input_ids": expanded,
        "attention_mask": mask,
        "pixel_values": pixels,
        "prompt_mask": (image_mask | language_mask).long(),
        **_aux(case, name),
    }
    return Batch(inputs, image_mask, language_mask)


def _aux(case: GoldenCase, name: str) -> dict[str, torch.Tensor]:
    if not has_raw_aux(case, name):
        return {"aux_features": case.input(f"{name}/aux_embeds")}
    colours = segment_colours(case.input(f"{name}/panoptic_index_map"))
    case.check_if_present(f"{name}/panoptic_map_chw_0to1", colours)
    aux = {
        "aux_input_ids": case.input(f"{name}/verb_input_ids"),
        "aux_pixel_values": normalised(case, colours.half()),
    }
    ignored = f"{name}/verb_attention_mask_ignored_by_original"
    return aux | ({"aux_attention_mask": case.input(ignored)} if case.has(ignored) else {})
