"""LoRA adapters of released Uni-MoE models: merged into the weights, or carried over to the fused experts of ours.

A weight W [out, in] becomes W + alpha / r * B @ A with A [r, in] and B [out, r] (arXiv 2106.09685, section 4.1).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ...errors import ConversionError
from ..checkpoints.checkpoint_reader import TensorInfo, read_json
from ..checkpoints.key_rules import Shape

LORA_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_ROUTER_LORA = re.compile(r".+\.mlp\.gate\.lora_[AB](?:\.default)?\.weight")
# Fields of adapter_config.json that change the arithmetic, and the values that mean plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


class Factor(Protocol):
    """A tensor of an adapter file."""

    @property
    def name(self) -> str: ...

    @property
    def info(self) -> TensorInfo: ...

    def read(self) -> torch.Tensor: ...

    def drop(self, reason: str) -> None: ...

    def consume(self, ours: str) -> None: ...


@dataclass(frozen=True)
class Lora:
    """What is added to one weight."""

    a: Factor
    b: Factor
    scale: float

    @classmethod
    def fitting(cls, original: str, shape: Shape, a: Factor, b: Factor, config: Mapping[str, float]) -> "Lora":
        """Raises ConversionError when the factors do not fit the weight or the configured rank."""
        rank = int(config["r"])
        if len(shape) != 2 or a.info.shape != (rank, shape[1]) or b.info.shape != (shape[0], rank):
            raise ConversionError(
                f"LoRA of {original} {list(shape)} has factors {list(a.info.shape)} and {list(b.info.shape)}; rank {rank} "
                "asks for others. Base and fine-tuned model do not belong together."
            )
        return cls(a, b, config["lora_alpha"] / rank)

    @property
    def tensors(self) -> tuple[Factor, Factor]:
        return self.a, self.b

    def merged_into(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter added, in float32."""
        return add_low_rank(weight, self.a.read(), self.b.read(), self.scale)


@dataclass(frozen=True)
class MergedFactor:
    """A factor that LoRA has changed itself: the 8-expert variant has pairs inside its MLPs, and trained some by LoRA."""

    tensor: Factor
    changes: tuple[Lora, ...]

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def info(self) -> TensorInfo:
        return self.tensor.info

    def read(self) -> torch.Tensor:
        tensor = self.tensor.read()
        for change in self.changes:
            tensor = change.merged_into(tensor)
        return tensor

    def drop(self, reason: str) -> None:
        for part in self._parts():
            part.drop(reason)

    def consume(self, ours: str) -> None:
        for part in self._parts():
            part.consume(ours)

    def _parts(self) -> list[Factor]:
        return [self.tensor, *(factor for change in self.changes for factor in change.tensors)]


def add_low_rank(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """weight + scale * b @ a, float32; of float32 weights it is the exact sum, rounded once."""
    wide = torch.float64 if weight.dtype == torch.float32 else torch.float32
    return (weight.to(wide) + (b.to(wide) @ a.to(wide)) * scale).float()


def is_lora_of_router(name: str) -> bool:
    return _ROUTER_LORA.fullmatch(name) is not None


def read_lora_scale(path: Path) -> dict[str, float]:
    """`r` and `lora_alpha` of an adapter_config.json.

    Raises:
        ConversionError: they are missing, or the adapter is more than plain LoRA.
    """
    config = read_json(path)
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise ConversionError(f"{path} has {name} = {config.get(name)!r}; Uni-MoE's adapters are plain LoRA.")
    scale = {name: config.get(name) for name in ("r", "lora_alpha")}
    if not all(isinstance(value, int | float) and 0 < value < float("inf") for value in scale.values()):
        raise ConversionError(f"{path} has r = {scale['r']!r} and lora_alpha = {scale['lora_alpha']!r}; give both.")
    return {name: value for name, value in scale.items() if value is not None}


def lora_modules(path: Path) -> list[str]:
    """The modules that an adapter_config.json lists: whole names, or ends of names. Empty where it lists none."""
    modules = read_json(path).get("target_modules")
    return [module for module in modules if isinstance(module, str)] if isinstance(modules, list) else []
