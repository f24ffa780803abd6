"""The parts of a recipe below its stages: adapters, experts, and what the sparse model becomes."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import RecipeError
from .recipe_values import require, require_choice, require_range

ROUTER_INITS = ("modality_means", "normal", "zeros")
LORA_TARGETS = ("attention", "experts", "ffn")
MAX_NAME = 60  # characters of a stage or an expert; file systems allow 255 bytes, of which ours add some


@dataclass
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685) of a stage; they are merged into the weights when the stage ends.

    Args:
        targets: roles that get adapters, of "attention" (q, k, v, o), "experts" (the fused tensors, `rank` per
            expert) and "ffn" (gate, up, down of dense layers).
        dropout: on the input of the adapters; PEFT has none for fused experts, so it must be 0 with "experts".
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["experts", "attention"])

    def check(self, where: str) -> None:
        require_range(f"{where}.rank", self.rank, 1, 65_536)
        require(self.alpha > 0 and math.isfinite(self.alpha), f"{where}.alpha", self.alpha, "a positive number")
        require(0 <= self.dropout < 1, f"{where}.dropout", self.dropout, "at least 0 and below 1")
        require(bool(self.targets), f"{where}.targets", self.targets, f"a list of {LORA_TARGETS}")
        for target in self.targets:
            require_choice(f"{where}.targets", target, LORA_TARGETS)
        if self.dropout and "experts" in self.targets:
            raise RecipeError(
                f"{where}.dropout is {self.dropout}; it must be 0 when targets holds 'experts', because adapters on "
                "fused parameters have no input to drop."
            )


@dataclass
class ExpertConfig:
    """One run of an "experts" stage: a copy of the dense FFN that learns some modalities."""

    name: str
    modalities: list[str]
    steps: int | None = None

    def check(self, where: str) -> None:
        require_folder_name(f"{where}.name", self.name)
        require(bool(self.modalities), f"{where}.modalities", self.modalities, "a list with at least one name")
        if self.steps is not None:
            require_range(f"{where}.steps", self.steps, 1, 1 << 40)


@dataclass
class MoeConfig:
    """What the assembled model becomes; see `UniMoeTextConfig` for the fields that are named alike.

    Args:
        sparse_layers: 0-based layers that become sparse; None means every layer.
        num_experts: None means as many as the "experts" stage trained.
        router_init: "modality_means" points gate row e at the mean router input of expert e's modalities, "normal"
            draws the rows, "zeros" treats every expert alike.
        router_init_scale: for "modality_means": by how much the logit of a modality's own expert exceeds the average
            over experts at the start.
        routing: further fields of `UniMoeTextConfig` (`ROUTING_FIELDS` of conversion/upcycling/sparsity.py), for example
            {"router_type": "dynamic", "router_top_p": 0.7}.
    """

    sparse_layers: list[int] | None = None
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    expert_groups: dict[str, list[int]] | None = None
    modality_groups: dict[str, str] | None = None
    modality_experts: dict[str, list[int]] | None = None
    router_init: Literal["modality_means", "normal", "zeros"] = "modality_means"
    router_init_scale: float = 1.0
    router_jitter_noise: float = 0.0
    routing: dict[str, Any] | None = None

    def check(self, where: str) -> None:
        require_choice(f"{where}.router_init", self.router_init, ROUTER_INITS)
        if self.num_experts is not None:
            require_range(f"{where}.num_experts", self.num_experts, 1, 4096)
        require_range(f"{where}.num_experts_per_tok", self.num_experts_per_tok, 1, self.num_experts or 4096)
        require(self.sparse_layers != [], f"{where}.sparse_layers", self.sparse_layers, "None or a list of layers")
        require(
            self.router_init != "modality_means" or self.expert_groups is None,
            f"{where}.router_init",
            self.router_init,
            "'normal' or 'zeros' with expert_groups",
        )
        for name in ("router_init_scale", "router_jitter_noise"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{where}.{name}", value, "finite and at least 0")
        if self.routing:
            self._check_routing(where)

    def _check_routing(self, where: str) -> None:
        from huggingface_hub.errors import StrictDataclassError

        from ...conversion.upcycling.sparsity import ROUTING_FIELDS
        from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig

        known = ROUTING_FIELDS - set(self.__dataclass_fields__)
        if unknown := sorted(set(self.routing) - known):
            raise RecipeError(f"{where}.routing names {unknown}; it may set {', '.join(sorted(known))}.")
        for name, value in self.routing.items():
            config = UniMoeTextConfig(num_hidden_layers=1)
            try:
                setattr(config, name, value)  # checks its type, and whether it is one of the allowed words
            except StrictDataclassError as error:
                raise RecipeError(f"{where}.routing: {' '.join(str(error.__cause__ or error).split())}") from error


def require_folder_name(where: str, name: str) -> None:
    plain = name == name.strip() and name.isprintable() and not set(name) & set('/\\:*?"<>|.')
    allowed = "a name that can be a folder (no dots, slashes, wildcards or spaces around it)"
    require(plain and 0 < len(name) <= MAX_NAME, where, name, f"{allowed} of at most {MAX_NAME} characters")
