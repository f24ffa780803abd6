"""MoAI-7B at its real sizes: every name of the original has its place, and counts agree.

The file holds every name and shape, no values: a tensor of one value, expanded, takes a few bytes.
"""

import json
import math
from pathlib import Path

import moai_shapes
import torch

from unimoe.conversion.checkpoints.parameters import count_parameters
from unimoe.conversion.released.import_moai import plan_moai


def test_every_tensor_of_the_real_model_has_its_place(tmp_path: Path) -> None:
    shapes = moai_shapes.shapes()
    (tmp_path / "config.json").write_text(json.dumps(moai_shapes.CONFIG))
    value = torch.zeros((), dtype=torch.bfloat16)
    torch.save({name: value.expand(shape) for name, shape in shapes.items()}, tmp_path / "pytorch_model.bin")
    plan = plan_moai(str(tmp_path))
    assert {tensor.fate for tensor in plan.gathered.tensors} == {"consumed"}
    assert len(plan.gathered.tensors) == len(shapes)
    written = sum(math.prod(output.shape) for output in plan.outputs)
    assert written == sum(math.prod(shape) for shape in shapes.values()) - 4096  # the row of <image>

    counts = {role: count.total for role, count in count_parameters(plan.config).items()}
    assert counts == {
        "towers": 304_172_032,
        "connectors": 20_979_712,
        "compressor": 151_363_584,
        "mixers": 50_331_648,
        "mixer_gates": 98_328,
        "plora": 603_979_776,
        "ffn": 5_637_144_576,
        "attention": 1_342_177_280,
        "norms": 266_240,
        "embeddings": 379_060_224,
        "head": 379_060_224,
    }
    assert sum(counts.values()) == written
    text = plan.config.text_config
    assert (text.mixer_config.layers, text.mixer_config.rank, text.mixer_config.num_latents) == (
        [7, 15, 23, 31],
        64,
        64,
    )
    assert (text.mixer_config.compressor_heads, text.mixer_config.compressor_head_dim) == (4, 64)
    assert (text.plora_config.rank, text.plora_config.alpha) == (256, 256)
    assert (plan.config.image_token_id, plan.config.vision_config.image_size) == (92_544, 490)
    assert plan.config.vision_config.num_attention_heads == 16
