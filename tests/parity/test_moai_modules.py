"""MoAI's parts one by one against golden data: compressor, experts, partial LoRA, pixels, positions."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from golden import GoldenCase
from moai_case import is_moai, moai_model
from planted import require_noticed
from unimoe_case import record

from unimoe.conversion.released.moai_keys import EXPERTS
from unimoe.conversion.released.moai_processor import moai_image_processor, resized_positions

REQUIREMENTS = {
    "compressor": pytest.mark.golden("modules/compressor/in", weights="moai_compressor.latents", where=is_moai),
    "experts": pytest.mark.golden("modules/expert/q", "modules/expert/kv", weights="*.moai_SA_*", where=is_moai),
    "plora": pytest.mark.golden("modules/plora/in", "modules/plora/im_mask", weights="*.Plora_A.*", where=is_moai),
    "pixels": pytest.mark.golden("modules/image_processor/in_uint8"),
    "positions": pytest.mark.golden(
        "vision/pos_embed_pretrained", where=lambda case: {"vision_grid"} <= set(case.config)
    ),
}


@REQUIREMENTS["compressor"]
def test_moai_compressor_and_its_blocks(golden_case: GoldenCase) -> None:
    check_compressor(golden_case)


@REQUIREMENTS["experts"]
def test_moai_experts_alone(golden_case: GoldenCase) -> None:
    check_experts(golden_case)


@REQUIREMENTS["plora"]
def test_moai_partial_lora_with_and_without_images(golden_case: GoldenCase) -> None:
    check_plora(golden_case)


@REQUIREMENTS["pixels"]
def test_moai_pixels(golden_case: GoldenCase) -> None:
    check_pixels(golden_case)


@REQUIREMENTS["positions"]
def test_moai_positions_of_another_grid(golden_case: GoldenCase) -> None:
    check_positions(golden_case)


@torch.no_grad()
def check_compressor(case: GoldenCase) -> None:
    compressor = moai_model(case).model.aux_compressor
    blocks = [record(block) for block in compressor.blocks]
    result = compressor(case.input("modules/compressor/in"))
    case.check_if_present("modules/compressor/out", result)
    for number, block in enumerate(blocks):
        case.check_if_present(f"modules/compressor/block{number}_out", block["output"])


@torch.no_grad()
def check_experts(case: GoldenCase) -> None:
    """Of the first mixer: `{name}_out` reads other rows, `{name}_self_out` its own."""
    model = moai_model(case)
    mixer = model.model.language_model.layers[model.config.text_config.mixer_config.layers[0]].mixer
    query, source = case.input("modules/expert/q")[None], case.input("modules/expert/kv")[None]
    for name, ours in EXPERTS.items():
        expert = mixer.get_submodule(ours)
        case.check_if_present(f"modules/expert/{name}_out", expert(query, source)[0])
        case.check_if_present(f"modules/expert/{name}_self_out", expert(query, query)[0])


@torch.no_grad()
def check_plora(case: GoldenCase) -> None:
    """Of the first layer; queries, keys and values alternate per key-value head in the original."""
    layer = moai_model(case).model.language_model.layers[0]
    x, image_mask = case.input("modules/plora/in"), case.input("modules/plora/im_mask")
    attention = layer.self_attn
    for name, mask in (("wqkv_out", image_mask), ("wqkv_out_nomask", None)):
        projected = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        parts = [
            part.unflatten(-1, (attention.config.num_key_value_heads, -1))
            for part in attention.plora.inputs(x, projected, mask)
        ]
        case.check_if_present(f"modules/plora/{name}", torch.cat(parts, dim=-1).flatten(-2))
    case.check_if_present("modules/plora/feed_forward_out", layer.mlp(x, image_mask=image_mask))


def check_pixels(case: GoldenCase) -> None:
    picture = case.input("modules/image_processor/in_uint8")[0]
    pixels = moai_image_processor(picture.shape[-1])(
        images=[PIL.Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))], return_tensors="pt"
    )["pixel_values"]
    case.check_if_present("modules/image_processor/out", pixels)


def check_positions(case: GoldenCase) -> None:
    table, grid = case.input("vision/pos_embed_pretrained"), case.config["vision_grid"]
    case.check_if_present("vision/pos_embed_resized", resized_positions(table, grid))


@pytest.mark.parametrize(
    ("check", "pattern"),
    [
        ("compressor", "modules/compressor/block*_out"),
        ("compressor", "modules/compressor/out"),
        ("experts", "modules/expert/*_out"),
        ("plora", "modules/plora/wqkv_out"),
        ("plora", "modules/plora/wqkv_out_nomask"),
        ("plora", "modules/plora/feed_forward_out"),
        ("pixels", "modules/image_processor/out"),
        ("positions", "vision/pos_embed_resized"),
    ],
)
def test_one_changed_value_of_moai_modules_is_noticed(check: str, pattern: str, tmp_path: Path) -> None:
    require_noticed(globals()[f"check_{check}"], REQUIREMENTS[check], pattern, tmp_path / "moai")
