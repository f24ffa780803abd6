"""MobileNetV2 as Keras computes it, in torch: the reference for what is read from its files."""

import numpy as np
import torch
import torch.nn.functional as F

_STRIDE_2_BLOCKS = (1, 3, 6, 13)


def keras_forward(arrays: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """MobileNetV2 as Keras computes it, straight from its arrays: [n, 3, s, s] → [n, 1280, s/32, s/32]."""

    def run(x: torch.Tensor, name: str, norm: str, stride: int = 1, activate: bool = True) -> torch.Tensor:
        kernel = torch.from_numpy(arrays[f"{name}/kernel"])
        depthwise = "depthwise" in name
        weight = kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1)
        if weight.shape[-1] == 3:
            x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        x = F.conv2d(x, weight, stride=stride, groups=weight.shape[0] if depthwise else 1)
        keys = ("moving_mean", "moving_variance", "gamma", "beta")
        x = F.batch_norm(x, *(torch.from_numpy(arrays[f"{norm}/{key}"]) for key in keys), eps=1e-3)
        return x.clamp(0, 6) if activate else x

    x = run(x, "Conv1", "bn_Conv1", stride=2)
    x = run(x, "expanded_conv_depthwise", "expanded_conv_depthwise_BN")
    x = run(x, "expanded_conv_project", "expanded_conv_project_BN", activate=False)
    for index in range(1, 17):
        block = f"block_{index}"
        y = run(x, f"{block}_expand", f"{block}_expand_BN")
        y = run(y, f"{block}_depthwise", f"{block}_depthwise_BN", stride=2 if index in _STRIDE_2_BLOCKS else 1)
        y = run(y, f"{block}_project", f"{block}_project_BN", activate=False)
        x = x + y if x.shape == y.shape else y
    return run(x, "Conv_1", "Conv_1_bn")
