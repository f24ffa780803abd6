"""The checkpoint of EfficientNet-Lite: tiny files written here must come back bit for bit, damaged ones must be refused."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import EfficientNetModel

from unimoe.errors import PartError
from unimoe.quickstart.read_efficientnet import (
    efficientnet_lite2_config,
    efficientnet_lite2_state,
    read_state_dict,
)

_LITE2_STAGES = ((1, 1, 3, 1), (3, 6, 3, 2), (3, 6, 5, 2), (4, 6, 3, 2), (4, 6, 5, 1), (5, 6, 5, 2), (1, 6, 3, 1))
_LITE2_OUT = (16, 24, 48, 88, 120, 208, 352)


def _lite2_blocks() -> list[tuple[int, int, int, int, int]]:
    """(in, out, expansion, kernel, stride) of each block of EfficientNet-Lite2."""
    blocks, narrow = [], 32
    for (repeats, expansion, kernel, stride), out in zip(_LITE2_STAGES, _LITE2_OUT, strict=True):
        for index in range(repeats):
            blocks.append((narrow, out, expansion, kernel, stride if index == 0 else 1))
            narrow = out
    return blocks


def _lite2_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def layer(name: str, norm: str, shape: tuple[int, ...]) -> None:
        scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        for key, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.5, 0.5)):
            tensors[f"{norm}.{key}"] = torch.rand(shape[0], generator=generator) * (high - low) + low
        tensors[f"{norm}.running_var"] = torch.rand(shape[0], generator=generator) + 0.5

    layer("_conv_stem", "_bn0", (32, 3, 3, 3))
    for index, (narrow, out, expansion, kernel, _) in enumerate(_lite2_blocks()):
        wide, block = narrow * expansion, f"_blocks.{index}"
        if expansion > 1:
            layer(f"{block}._expand_conv", f"{block}._bn0", (wide, narrow, 1, 1))
        layer(f"{block}._depthwise_conv", f"{block}._bn1", (wide, 1, kernel, kernel))
        layer(f"{block}._project_conv", f"{block}._bn2", (out, wide, 1, 1))
    layer("_conv_head", "_bn1", (1280, 352, 1, 1))
    return tensors


def _lite2_forward(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite2 straight from the published tensors, with TensorFlow's SAME padding."""

    def run(x: torch.Tensor, name: str, norm: str, stride: int = 1, activate: bool = True) -> torch.Tensor:
        weight = tensors[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=weight.shape[0] if "depthwise" in name else 1)
        statistics = (tensors[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *statistics, eps=1e-3)
        return x.clamp(0, 6) if activate else x

    x = run(x, "_conv_stem", "_bn0", stride=2)
    for index, (narrow, out, expansion, _, stride) in enumerate(_lite2_blocks()):
        block, y = f"_blocks.{index}", x
        if expansion > 1:
            y = run(y, f"{block}._expand_conv", f"{block}._bn0")
        y = run(y, f"{block}._depthwise_conv", f"{block}._bn1", stride=stride)
        y = run(y, f"{block}._project_conv", f"{block}._bn2", activate=False)
        x = x + y if stride == 1 and narrow == out else y
    return run(x, "_conv_head", "_bn1")


def test_efficientnet_lite2_computes_what_the_published_network_computes() -> None:
    tensors = _lite2_tensors()
    model = EfficientNetModel(efficientnet_lite2_config()).eval()
    outcome = model.load_state_dict(efficientnet_lite2_state(tensors), strict=False)
    assert not outcome.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in outcome.missing_keys)
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        ours, theirs = model(x).last_hidden_state, _lite2_forward(tensors, x)
    difference = (ours - theirs).abs().max().item()
    print(f"EfficientNet-Lite2 at 96 px, random weights: max |difference| {difference:.1e}")
    assert ours.std() > 0.1
    assert difference < 1e-5


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "w.pth"
    torch.save({"weight": torch.ones(2), "payload": Payload()}, path)
    with pytest.raises(PartError, match="not a plain PyTorch state dict"):
        read_state_dict(path)
    assert not (tmp_path / "executed").exists()
    torch.save({"weight": "text"}, path)
    with pytest.raises(PartError, match="something other than named tensors"):
        read_state_dict(path)
    torch.save({"weight": torch.tensor([float("nan")])}, path)
    with pytest.raises(PartError, match="not finite"):
        read_state_dict(path)
    path.write_bytes(b"garbage")
    with pytest.raises(PartError, match="not a plain PyTorch state dict"):
        read_state_dict(path)


def test_incomplete_efficientnet_is_refused() -> None:
    tensors = _lite2_tensors()
    del tensors["_blocks.3._bn2.running_var"]
    with pytest.raises(PartError, match=r"lacks _blocks\.3\._bn2"):
        efficientnet_lite2_state(tensors)
