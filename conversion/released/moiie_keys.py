"""Tensor names of MoIIE's code, for each of its architectures and backbones, and what each becomes in ours.

    moiie      mlp.experts.{0..E-1}, gate (language), gate_vis (vision): overlapping pools
    separate   mlp.lan_experts.{i}, mlp.vis_experts.{i}, gate, gate_vis: disjoint pools
    vanilla    mlp.experts.{0..E-1}, gate: one pool
    modality   mlp.language_expert, mlp.vision_expert: no choice, so no gate; ours is then made of zeros
    dense      no experts

Phi-3 fuses q, k and v, and gate and up, dense layers and experts alike; LLaMA fuses nothing. Our gates hold the rows of
the group "language" first, because groups follow each other by name.
"""

from dataclasses import dataclass
from typing import Literal

from ..checkpoints.key_rules import Rows, Rule
from ..checkpoints.llava_keys import (
    ATTENTION,
    FFN,
    LANGUAGE,
    NORMS,
    OUTSIDE_LAYERS,
    PROJECTOR_RULES,
    expert_rules,
    layer_rules,
    vision_rules,
)
from ..dense.fused_layouts import PHI3_FUSED, AttentionSizes, phi3_rows

Kind = Literal["moiie", "separate", "vanilla", "modality", "dense"]
Backbone = Literal["phi3", "llama"]
# Architectures that tell vision from language.
GROUPED: tuple[Kind, ...] = ("moiie", "separate", "modality")

_LAYER, _OUR_LAYER = "model.layers.{layer}.", LANGUAGE + "layers.{layer}."
_UNREACHED = "no router of the original reaches this expert"


@dataclass(frozen=True)
class Pools:
    """Experts of ours that vision and language tokens may choose from.

    `unreached` are numbers of the original's experts behind ours, which none of its routers has a row for.
    """

    vision: range
    language: range
    unreached: range = range(0)

    @property
    def num_experts(self) -> int:
        return max(self.language.stop, self.vision.stop)


@dataclass(frozen=True)
class Sizes:
    """What the rows of the fused tensors of a decoder follow from."""

    attention: AttentionSizes
    intermediate: int


def moiie_rules(
    kind: Kind, backbone: Backbone, sizes: Sizes, pools: Pools | None, vision_prefix: str
) -> tuple[Rule, ...]:
    """The rules of one architecture on one backbone.

    Args:
        pools: None for a dense model.
        vision_prefix: what the vision tower's tensors start with in ours, see `llava_keys.vision_prefix`.
    """
    sparse = () if pools is None else (*_gate_rules(kind, pools), *_expert_rules(kind, backbone, pools))
    decoder = _phi3_rules(sizes) if backbone == "phi3" else layer_rules(*ATTENTION, *FFN)
    inside = (*layer_rules(*NORMS), *sparse, *decoder)
    return (*OUTSIDE_LAYERS, *inside, *PROJECTOR_RULES, *vision_rules(vision_prefix))


def _gate_rules(kind: Kind, pools: Pools) -> tuple[Rule, ...]:
    gate, ours = f"{_LAYER}mlp.gate.weight", f"{_OUR_LAYER}mlp.gate.weight"
    if kind == "modality":
        return ()
    if kind == "vanilla":
        return (Rule(gate, ours),)
    first, total = len(pools.language), len(pools.language) + len(pools.vision)
    return (
        Rule(gate, ours, "rows", 0, 2, filled=Rows(0, first, total)),
        Rule(f"{_LAYER}mlp.gate_vis.weight", ours, "rows", 1, 2, filled=Rows(first, total, total)),
    )


def _expert_rules(kind: Kind, backbone: Backbone, pools: Pools) -> tuple[Rule, ...]:
    make = _phi3_expert_rules if backbone == "phi3" else expert_rules
    if kind == "modality":
        return (
            *make("vision_expert", pools.vision, numbered=False),
            *make("language_expert", pools.language, numbered=False),
        )
    if kind == "separate":
        return (*make("vis_experts", pools.vision), *make("lan_experts", pools.language))
    dead = [Rule(f"{_LAYER}mlp.experts.{i}.{{rest}}", None, reason=_UNREACHED) for i in pools.unreached]
    return (*dead, *make("experts"))


def _phi3_expert_rules(module: str, experts: range | None = None, numbered: bool = True) -> tuple[Rule, ...]:
    below = f"{_LAYER}mlp.{module}" + (".{expert}" if numbered else "")
    return tuple(
        Rule(f"{below}.{name}.weight", f"{_OUR_LAYER}mlp.experts.{name}", "expert", experts=experts)
        for name in ("gate_up_proj", "down_proj")
    )


def _phi3_rules(sizes: Sizes) -> tuple[Rule, ...]:
    """Attention and dense FFNs of Phi-3, two of whose tensors are fused."""
    split: list[Rule] = []
    for fused, parts in PHI3_FUSED.items():
        rows = phi3_rows(fused, sizes.attention, sizes.intermediate)
        split += _split(fused, dict(zip(parts, rows, strict=True)))
    return (*split, *layer_rules("self_attn.o_proj", "mlp.down_proj"))


def _split(original: str, parts: dict[str, int]) -> tuple[Rule, ...]:
    """Rules of a fused tensor: so many rows for each of ours, in this order."""
    total, start, rules = sum(parts.values()), 0, []
    for ours, rows in parts.items():
        taken = Rows(start, start + rows, total)
        rules.append(Rule(f"{_LAYER}{original}.weight", f"{_OUR_LAYER}{ours}.weight", taken=taken))
        start += rows
    return tuple(rules)
