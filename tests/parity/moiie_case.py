"""Our models of golden MoIIE cases, and the original's batches as ours."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from golden import GoldenCase
from transformers import SiglipVisionConfig

from unimoe import UniMoeConfig, UniMoeForCausalLM
from unimoe.conversion.checkpoints.key_rules import KeyMap
from unimoe.conversion.checkpoints.llava_keys import vision_prefix
from unimoe.conversion.checkpoints.our_folder import expected_tensors
from unimoe.conversion.released.moiie_config import our_moiie_config, sizes_of
from unimoe.conversion.released.moiie_keys import moiie_rules
from unimoe.conversion.released.moiie_variant import MoiieVariant, recognise_moiie

IMAGE = -200
IGNORED = -100


def is_moiie(case: GoldenCase) -> bool:
    """Whether a case's config is one of MoIIE, whose released code calls its models Bunny."""
    return str(case.config.get("model_type", "")).startswith("bunny")


def has_vision_mask(case: GoldenCase) -> bool:
    """Whether the original routes by modality."""
    return is_moiie(case) and moiie_variant(case).kind in ("moiie", "separate", "modality")


@dataclass(frozen=True)
class Converted:
    """A case in our terms; `state` lacks the gates where the original has none."""

    variant: MoiieVariant
    config: UniMoeConfig
    state: dict[str, torch.Tensor]
    key_map: KeyMap


def moiie_variant(case: GoldenCase) -> MoiieVariant:
    return converted(case.path).variant


@lru_cache(maxsize=8)
def converted(path: Path) -> Converted:
    case = GoldenCase(path, ledger=None)
    vision = SiglipVisionConfig(**case.json("vision_config"))
    return convert(case.weights, case.config, vision)


def convert(
    weights: dict[str, torch.Tensor], config: dict[str, Any], vision: SiglipVisionConfig | None = None
) -> Converted:
    """Tensors of the original, in memory, as ours."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    variant = recognise_moiie(shapes, config)
    ours = our_moiie_config(config, variant, vision, shapes)
    expected = expected_tensors(ours)
    rules = moiie_rules(
        variant.kind, variant.backbone, sizes_of(ours.text_config), variant.pools, vision_prefix(expected)
    )
    key_map = KeyMap(rules)
    state = key_map.convert(weights)
    if not variant.has_routers or variant.kind == "modality":
        gates = {name: torch.zeros(tensor.shape) for name, tensor in expected.items() if name.endswith(".gate.weight")}
        state = gates | state
    return Converted(variant, ours, state, key_map)


def moiie_model(case: GoldenCase, experts: str | None = None, **fields: Any) -> UniMoeForCausalLM:
    """Our model with the golden weights in float32, fresh.

    Args:
        experts: which implementation of the experts.
        fields: fields of the configuration to change; those of the decoder in `text`.
    """
    whole = converted(case.path)
    given = {k: v for k, v in whole.config.to_dict().items() if k != "model_type"}
    given["text_config"] = {**given["text_config"], **fields.pop("text", {})}
    model = UniMoeForCausalLM(UniMoeConfig(**{**given, **fields}))
    model.load_state_dict(whole.state)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model.eval()


@dataclass
class Batch:
    """An original batch as inputs of ours.

    Args:
        inputs: for `UniMoeForCausalLM.forward`.
        labels: [B, S].
        lengths: tokens per row; beyond them the original has zero vectors.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    lengths: list[int]


def moiie_batch(case: GoldenCase, name: str, model: UniMoeForCausalLM) -> Batch:
    """The inputs `{name}.in.*` as the original merges them: padding out, features in, zeros up to the longest row."""
    mask = case.input(f"{name}.in.attention_mask")
    labels, pixels = case.input(f"{name}.in.labels"), case.input(f"{name}.in.pixel_values")
    rows: list[list[int]] = []
    answers: list[list[int]] = []
    used, following = [], 0
    for ids, kept, learned in zip(case.input(f"{name}.in.input_ids"), mask, labels, strict=True):
        row, answer = expand_images(ids[kept].tolist(), learned[kept].tolist(), model)
        count = int((ids[kept] == IMAGE).sum())
        used += range(following, following + count)
        following += max(count, 1)  # a row without an image passes one over
        rows.append(row)
        answers.append(answer)
    lengths = [len(row) for row in rows]
    width = max(lengths)
    inputs = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long(),
    }
    if used:
        inputs["pixel_values"] = pixels[used]
    padded = [answer + [IGNORED] * (width - len(answer)) for answer in answers]
    return Batch(inputs, torch.tensor(padded), lengths)


def expand_images(ids: list[int], labels: list[int], model: UniMoeForCausalLM) -> tuple[list[int], list[int]]:
    """Ids and labels with every image in the place of its one placeholder."""
    config = model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    row: list[int] = []
    answer: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        count = patches if token == IMAGE else 1
        row += [model.config.image_token_id if token == IMAGE else token] * count
        answer += [IGNORED if token == IMAGE else label] * count
    return row, answer


def group_names(model: UniMoeForCausalLM) -> list[str]:
    return [group.name for group in model.config.text_config.router_groups]
