"""Weights in 4 bits for torchao, on any device: two values to a byte, a scale and a lowest value for every group.

torchao's own 4-bit formats are made for the kernels of one kind of device each, and none of them holds fused experts
on a CPU. This one has no kernel: a product brings back the weight that it needs, which for fused experts is one expert.
Import it only where torchao is installed; that alone lets transformers load and save models that are held in it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

try:
    from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
    from torchao.prototype.safetensors import safetensors_utils as torchao_files
    from torchao.quantization.transform_module import register_quantize_module_handler
    from torchao.utils import TorchAOBaseTensor
except ImportError as error:
    raise ImportError("Weights in 4 bits need torchao: pip install 'unimoe[quantize]'.") from error

_STEPS = 15  # between the lowest and the highest of 16 values


class PackedInt4Tensor(TorchAOBaseTensor):
    """A weight [..., N, K] as `low + scale * q` with q from 0 to 15, in groups along K.

    Args:
        qdata: uint8 [..., N, K / 2]; a group's first half is in the low halves of its bytes.
        scale: [..., N, K / group_size], in the dtype that the weight had.
        zero_point: what q = 0 stands for, of shape and dtype of `scale`.
    """

    tensor_data_names = ["qdata", "scale", "zero_point"]
    tensor_attribute_names: list[str] = []

    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> "PackedInt4Tensor":
        shape = (*qdata.shape[:-1], 2 * qdata.shape[-1])
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale.dtype, device=qdata.device, requires_grad=False
        )

    def __init__(self, qdata: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        super().__init__()
        self.qdata, self.scale, self.zero_point = qdata, scale, zero_point

    @classmethod
    def pack(cls, weight: torch.Tensor, group_size: int) -> "PackedInt4Tensor":
        """Round a weight [..., N, K] of a floating point dtype; K is a multiple of the group size, which is even."""
        if weight.dim() > 2:  # one expert after the other, for the float32 in between
            packed = [cls.pack(one, group_size) for one in weight]
            return cls(*(torch.stack([getattr(one, name) for one in packed]) for name in cls.tensor_data_names))
        groups = weight.unflatten(-1, (-1, group_size)).float()
        low, high = groups.aminmax(dim=-1, keepdim=True)
        # Rounded to their stored dtype first, so that every q is the best one for what will be read back.
        low = low.to(weight.dtype)
        scale = ((high - low.float()) / _STEPS).to(weight.dtype)
        steps = (groups - low.float()) / torch.where(scale == 0, 1.0, scale.float())
        first, second = steps.round_().clamp_(0, _STEPS).to(torch.uint8).chunk(2, dim=-1)
        return cls((first | (second << 4)).flatten(-2), scale.squeeze(-1), low.squeeze(-1))

    def dequantize(self) -> torch.Tensor:
        """The weight [..., N, K] in the dtype that it had."""
        halves = self.qdata.unflatten(-1, (self.scale.shape[-1], -1))
        q = torch.cat((halves & 0xF, halves >> 4), dim=-1).to(self.dtype)
        return q.mul_(self.scale.unsqueeze(-1)).add_(self.zero_point.unsqueeze(-1)).flatten(-2)


@PackedInt4Tensor.implements(torch.ops.aten.linear.default)
@PackedInt4Tensor.implements_torch_function(F.linear)
def _linear(_func: Any, _types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, *rest = args
    bias = rest[0] if rest else (kwargs or {}).get("bias")
    return F.linear(x, weight.dequantize().to(x.dtype), bias)


@PackedInt4Tensor.implements(torch.ops.aten.select.int)
def _select(func: Any, _types: Any, args: Any, _kwargs: Any) -> PackedInt4Tensor:
    weight, dim, index = args
    if dim != 0 or weight.dim() != 3:
        raise NotImplementedError(
            f"Of a weight in 4 bits only experts can be taken out, not {index} of dimension {dim}."
        )
    return PackedInt4Tensor(*(func(part, 0, index) for part in (weight.qdata, weight.scale, weight.zero_point)))


@dataclass
class PackedInt4Config(AOBaseConfig):
    """Hold weights as `PackedInt4Tensor`.

    Args:
        group_size: how many values of a row share a scale; where a row is no multiple of it, the greatest common divisor.
    """

    group_size: int = 32


@register_quantize_module_handler(PackedInt4Config)
def _pack_parameter(module: nn.Module, config: PackedInt4Config, *, parameter_name: str = "weight") -> nn.Module:
    weight = getattr(module, parameter_name)
    group_size = math.gcd(weight.shape[-1], config.group_size)
    if group_size % 2:
        raise ValueError(
            f"{parameter_name} has rows of {weight.shape[-1]} values, which groups of {config.group_size} do not divide into "
            "pairs: leave it out of the quantised names, or choose an even group size."
        )
    setattr(module, parameter_name, nn.Parameter(PackedInt4Tensor.pack(weight, group_size), requires_grad=False))
    return module


# The three tables in which torchao looks up, by name, what a configuration and a file of safetensors hold.
ALLOWED_AO_MODULES.add(__name__)
torchao_files.ALLOWED_CLASSES[PackedInt4Tensor.__name__] = PackedInt4Tensor
if PackedInt4Tensor.__name__ not in torchao_files.ALLOWED_TENSORS_SUBCLASSES:
    torchao_files.ALLOWED_TENSORS_SUBCLASSES.append(PackedInt4Tensor.__name__)

__all__ = ["PackedInt4Config", "PackedInt4Tensor"]
