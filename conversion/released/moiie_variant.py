"""Which of MoIIE's architectures a checkpoint is, and on which backbone, read off its tensors.

Where the tensors leave it open (the original's converter writes no routers) the model_type of config.json decides; a
model_type that contradicts the tensors is an error.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConversionError
from ..checkpoints.key_rules import Shape
from ..checkpoints.llava_keys import PROJECTOR, VISION_TOWER
from .moiie_keys import Backbone, Kind, Pools

# model_type of config.json and the class that it belongs to.
MODEL_TYPES: dict[str, tuple[Kind, Backbone, str]] = {
    "bunny-mm-phi3-moe-s": ("moiie", "phi3", "BunnyMMSPhi3MoEForCausalLM"),
    "bunny-mm-phi3-moe": ("separate", "phi3", "BunnyMMPhi3MoEForCausalLM"),
    "bunny-phi3-moe": ("vanilla", "phi3", "BunnyPhi3MoEForCausalLM"),
    "bunny-phi3-m": ("modality", "phi3", "BunnyPhi3MMForCausalLM"),
    "bunny-phi3": ("dense", "phi3", "BunnyPhi3ForCausalLM"),
    "bunny-mm-llama3-moe-s": ("moiie", "llama", "BunnyMMSLlamaMoEForCausalLM"),
    "bunny-llama3-moe": ("vanilla", "llama", "BunnyLlamaMoEForCausalLM"),
    "bunny-llama-m": ("modality", "llama", "BunnyLlamaMMForCausalLM"),
    "bunny-llama": ("dense", "llama", "BunnyLlamaForCausalLM"),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.input_layernorm\.weight")
_MLP = re.compile(
    r"model\.layers\.(\d+)\.mlp\."
    r"(?:(experts|vis_experts|lan_experts)\.(\d+)\.|(vision_expert|language_expert)\.|(gate|gate_vis)\.weight$)"
)
_PROJECTOR_WEIGHT = re.compile(re.escape(PROJECTOR) + r"(?:(\d+)\.)?weight")
# What the routers of each architecture are called; modality has none.
_GATES: dict[Kind, tuple[str, ...]] = {
    "moiie": ("gate", "gate_vis"),
    "separate": ("gate", "gate_vis"),
    "vanilla": ("gate",),
    "modality": (),
    "dense": (),
}


@dataclass(frozen=True)
class MoiieVariant:
    """What was recognised, and by what.

    Args:
        pools: experts of each group; None for a dense model.
        has_routers: false right after the original's own conversion from a dense model.
        projector_depth: linear layers between the vision tower and the decoder; 0 for a language model alone.
        has_tower: whether the vision tower's weights are among the tensors.
        evidence: what was seen, for people.
    """

    kind: Kind
    backbone: Backbone
    num_layers: int
    sparse_layers: tuple[int, ...]
    pools: Pools | None
    num_experts_per_tok: int
    has_routers: bool
    projector_depth: int
    has_tower: bool
    evidence: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.backbone}"


def recognise_moiie(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> MoiieVariant:
    """The variant of a checkpoint.

    Args:
        shapes: tensor names -> shapes.
        config: its config.json.

    Raises:
        ConversionError: it is none of these; the message says which evidence is missing or contradicts itself.
    """
    backbone = _backbone(shapes)
    num_layers = _num_layers(shapes, config)
    seen = _Seen.of(shapes)
    kind = _kind(seen, backbone, config)
    has_routers = _check_gates(seen, kind)
    sparse = seen.layers
    _check_sparse(sparse, num_layers, kind)
    pools = None if kind == "dense" else _pools(seen, kind, config)
    chosen = 1 if kind in ("modality", "dense") else config.get("num_experts_per_tok")
    if not isinstance(chosen, int):
        raise ConversionError("config.json lacks num_experts_per_tok, without which the model is not defined.")
    evidence = [
        f"backbone: {'self_attn.qkv_proj (Phi-3)' if backbone == 'phi3' else 'self_attn.q_proj (LLaMA)'}",
        f"{kind}: " + (seen.told() if sparse else "no experts"),
    ]
    if pools is not None:
        evidence.append(f"experts of vision {[*pools.vision]}, of language {[*pools.language]}, {chosen} per token")
    depth = _projector_depth(shapes)
    if depth:
        evidence.append(f"image projector: {depth} linear layer(s) under {PROJECTOR}*")
    has_tower = any(name.startswith(VISION_TOWER) for name in shapes)
    return MoiieVariant(
        kind, backbone, num_layers, sparse, pools, chosen, has_routers, depth, has_tower, tuple(evidence)
    )


def model_type_of(kind: Kind, backbone: Backbone) -> tuple[str, str]:
    """model_type and class of the original. Raises ConversionError for a pair that it does not have."""
    for model_type, (own_kind, own_backbone, name) in MODEL_TYPES.items():
        if (own_kind, own_backbone) == (kind, backbone):
            return model_type, name
    raise ConversionError(f"The original has no {kind} model on {backbone}.")


@dataclass(frozen=True)
class _Seen:
    """What the names below `mlp.` show: experts per layer and module, and routers' rows per layer and name."""

    experts: dict[str, dict[int, set[int]]]
    gates: dict[str, dict[int, int]]

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> "_Seen":
        experts: dict[str, dict[int, set[int]]] = {}
        gates: dict[str, dict[int, int]] = {}
        for name, shape in shapes.items():
            match = _MLP.match(name)
            if match is None:
                continue
            layer = int(match[1])
            if match[5]:
                gates.setdefault(match[5], {})[layer] = shape[0]
            else:
                module = match[2] or match[4]
                experts.setdefault(module, {}).setdefault(layer, set()).add(int(match[3] or 0))
        return cls(experts, gates)

    @property
    def layers(self) -> tuple[int, ...]:
        with_experts = {layer for table in self.experts.values() for layer in table}
        return tuple(sorted(with_experts.union(*self.gates.values())))

    def told(self) -> str:
        modules = sorted(self.experts)
        gates = ", ".join(sorted(self.gates)) or "no router"
        where = ", ".join(map(str, self.layers[:4])) + (f", .. {self.layers[-1]}" if len(self.layers) > 4 else "")
        return f"mlp.{{{', '.join(modules)}}} and {gates} in layers {where}"

    def rows(self, gate: str) -> int:
        """Rows of a router, the same in every layer."""
        sizes = set(self.gates[gate].values())
        if len(sizes) != 1:
            raise ConversionError(f"The routers mlp.{gate} know {sorted(sizes)} experts in different layers.")
        return sizes.pop()

    def count(self, module: str) -> int:
        """Experts of a module, the same in every layer and numbered from 0 on."""
        numbers = {frozenset(found) for found in self.experts[module].values()}
        largest = max(numbers, key=len)
        wanted = frozenset(range(max(largest) + 1))
        for layer, found in sorted(self.experts[module].items()):
            if found != wanted:
                absent = min(wanted - found)
                raise ConversionError(f"model.layers.{layer}.mlp.{module}.{absent} is missing: fetch the files again.")
        if tuple(sorted(self.experts[module])) != self.layers:
            absent = min(set(self.layers) - set(self.experts[module]))
            raise ConversionError(f"model.layers.{absent}.mlp.{module} is missing: fetch the files again.")
        return len(wanted)


def _backbone(shapes: Collection[str]) -> Backbone:
    names = {
        backbone: f"model.layers.0.self_attn.{module}.weight"
        for backbone, module in (("phi3", "qkv_proj"), ("llama", "q_proj"))
    }
    found: list[Any] = [backbone for backbone, name in names.items() if name in shapes]
    if len(found) != 1:
        raise ConversionError(
            "The checkpoint cannot be recognised as MoIIE: it needs either model.layers.0.self_attn.qkv_proj.weight "
            "(Phi-3) or model.layers.0.self_attn.q_proj.weight (LLaMA). Give the folder as the original saved it."
        )
    return found[0]


def _num_layers(shapes: Collection[str], config: Mapping[str, Any]) -> int:
    layers = sorted(int(match[1]) for match in map(_LAYER.fullmatch, shapes) if match)
    if layers != list(range(len(layers))) or not layers:
        absent = min(set(range(len(layers) + 1)) - set(layers))
        raise ConversionError(f"model.layers.{absent}.input_layernorm.weight is missing: the decoder is not complete.")
    if config.get("num_hidden_layers", len(layers)) != len(layers):
        raise ConversionError(
            f"config.json says num_hidden_layers = {config['num_hidden_layers']} but the tensors show {len(layers)}."
        )
    return len(layers)


def _kind(seen: _Seen, backbone: Backbone, config: Mapping[str, Any]) -> Kind:
    modules = set(seen.experts)
    shown: list[Kind]
    if not modules:
        shown = ["dense"]
    elif modules == {"vision_expert", "language_expert"}:
        shown = ["modality"]
    elif modules == {"vis_experts", "lan_experts"}:
        shown = ["separate"]
    elif modules == {"experts"}:
        shown = ["moiie"] if "gate_vis" in seen.gates else ["vanilla"] if seen.gates else ["moiie", "vanilla"]
    else:
        raise ConversionError(
            f"The checkpoint cannot be recognised as MoIIE: its layers hold mlp.{{{', '.join(sorted(modules))}}}, which "
            "no architecture of it combines."
        )
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        if len(shown) > 1:
            raise ConversionError(
                f"There are experts and no routers, and config.json has model_type {model_type!r}: one of "
                f"{sorted(MODEL_TYPES)} is needed to tell MoIIE from vanilla."
            )
        return shown[0]
    said = MODEL_TYPES[model_type]
    if said[0] not in shown or said[1] != backbone:
        raise ConversionError(
            f"config.json says model_type = {model_type!r}, but the tensors are those of {shown[0]} on {backbone} "
            f"({seen.told() if modules else 'no experts'}). Give the config.json of this very model."
        )
    return said[0]


def _check_gates(seen: _Seen, kind: Kind) -> bool:
    """Whether the routers are there; some of them alone are an error."""
    wanted = set(_GATES[kind])
    for gate in set(seen.gates) - wanted:
        layer = min(seen.gates[gate])
        raise ConversionError(f"model.layers.{layer}.mlp.{gate}.weight is a router, which {kind} does not have.")
    missing = [
        (layer, gate) for gate in sorted(wanted) for layer in seen.layers if layer not in seen.gates.get(gate, {})
    ]
    if missing and seen.gates:
        layer, gate = missing[0]
        raise ConversionError(f"model.layers.{layer}.mlp.{gate}.weight is missing: fetch the files again.")
    return not missing


def _check_sparse(sparse: tuple[int, ...], num_layers: int, kind: Kind) -> None:
    odd = tuple(range(1, num_layers, 2))
    if kind != "dense" and sparse != odd:
        raise ConversionError(
            f"Layers {list(sparse)} have experts; the original's models have them in {list(odd)} and would not load this. "
            "(Its tool for modality models writes even layers, which is a mistake.)"
        )


def _pools(seen: _Seen, kind: Kind, config: Mapping[str, Any]) -> Pools:
    if kind == "modality":
        for module in ("language_expert", "vision_expert"):
            seen.count(module)
        return Pools(vision=range(0, 1), language=range(1, 2))
    if kind == "separate":
        language, vision = seen.count("lan_experts"), seen.count("vis_experts")
        _check_rows(seen, {"gate": language, "gate_vis": vision})
        return Pools(vision=range(vision), language=range(vision, vision + language))
    num_experts = seen.count("experts")
    if config.get("num_experts", num_experts) != num_experts:
        raise ConversionError(
            f"config.json says num_experts = {config['num_experts']} but the tensors show {num_experts}."
        )
    if kind == "vanilla":
        _check_rows(seen, {"gate": num_experts})
        return Pools(language=range(num_experts), vision=range(num_experts))
    candidates = int(num_experts / 2 + num_experts / 4)
    _check_rows(seen, {"gate": candidates, "gate_vis": candidates})
    # The original's language routers begin at expert 1, whatever the number of experts.
    return Pools(
        vision=range(candidates),
        language=range(1, candidates + 1),
        unreached=range(candidates + 1, num_experts),
    )


def _check_rows(seen: _Seen, wanted: Mapping[str, int]) -> None:
    for gate, rows in wanted.items():
        if gate in seen.gates and seen.rows(gate) != rows:
            raise ConversionError(
                f"The routers mlp.{gate} have {seen.rows(gate)} rows; with these experts the original has {rows}."
            )


def _projector_depth(shapes: Collection[str]) -> int:
    positions = sorted(int(match[1] or 0) for match in map(_PROJECTOR_WEIGHT.fullmatch, shapes) if match)
    if positions != list(range(0, 2 * len(positions), 2)):
        raise ConversionError(
            f"The image projector's layers are {positions} below {PROJECTOR}; 0, 2, 4, ... is needed."
        )
    return len(positions)
