"""Tensor names of the released Uni-MoE models, and what each becomes in ours. Data, read in both directions.

A rule pairs a name of the original with one of ours. Names are templates: `{layer}` and `{expert}` stand for numbers,
`{parameter}` for weight or bias, `{rest}` for anything. Where several tensors make one of ours, `how` says in what way:

    copy         the tensor itself
    expert       one of the parts of one expert; the parts of all experts follow each other
    weight_norm  magnitude g and direction v of a convolution, folded into g * v / |v| over all but the last dimension
    shared       the same tensor under the name of every layer; it is taken once, and must be the same everywhere
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ..errors import ConversionError

AudioKind = Literal["whisper", "beats"]
# How experts lie in the decoder: as modules of the model's own, or in DeepSpeed's (the 8-expert variant).
Layout = Literal["plain", "deepspeed"]
Shape = tuple[int, ...]

LANGUAGE = "model.language_model."
VISION_TOWER = "model.vision_tower.vision_tower."
AUDIO_TOWER = "model.audio_tower.audio_tower."
ALIGNER = "model.mm_audio_aligner."
PROJECTOR = "model.mm_projector."
_FIELDS = {
    "layer": r"(?P<layer>\d+)",
    "expert": r"(?P<expert>\d+)",
    "parameter": r"(?P<parameter>weight|bias)",
    "rest": r"(?P<rest>.+)",
}
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Rule:
    """One line of the map.

    Args:
        original, ours: templates; `ours` None drops the tensor, for `reason`.
        how: see the module's text.
        part, parts: which of how many pieces of one expert, or of one weight-normed tensor, this is.
    """

    original: str
    ours: str | None
    how: Literal["copy", "expert", "weight_norm", "shared"] = "copy"
    part: int = 0
    parts: int = 1
    reason: str = ""

    @cached_property
    def original_pattern(self) -> re.Pattern[str]:
        return _compiled(self.original)

    @cached_property
    def our_pattern(self) -> re.Pattern[str]:
        return _compiled(self.ours or r"")


_DECODER = (
    Rule("lm_head.weight", "lm_head.weight"),
    Rule("model.embed_tokens.weight", LANGUAGE + "embed_tokens.weight"),
    Rule("model.norm.weight", LANGUAGE + "norm.weight"),
    Rule(
        "model.layers.{layer}.self_attn.rotary_emb.inv_freq",
        None,
        reason="computed from the configuration: rotary angles",
    ),
    *(
        Rule(f"model.layers.{{layer}}.{name}.weight", f"{LANGUAGE}layers.{{layer}}.{name}.weight")
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{projection}_proj" for projection in "qkvo"),
            *(f"mlp.{projection}_proj" for projection in ("gate", "up", "down")),
        )
    ),
)


def _expert_rules(gate: str, experts: str) -> tuple[Rule, ...]:
    """Rules of a sparse layer, whose router and experts the original calls so below `mlp.`."""
    layer = "model.layers.{layer}.mlp."
    return (
        Rule(f"{layer}{gate}.weight", LANGUAGE + "layers.{layer}.mlp.gate.weight"),
        *(
            Rule(
                f"{layer}{experts}.{{expert}}.{projection}.weight",
                f"{LANGUAGE}layers.{{layer}}.mlp.experts.{fused}",
                "expert",
                part,
                parts,
            )
            for projection, fused, part, parts in (
                ("gate_proj", "gate_up_proj", 0, 2),
                ("up_proj", "gate_up_proj", 1, 2),
                ("down_proj", "down_proj", 0, 1),
            )
        ),
    )


_OTHER_EXPERTS = "router and experts of the 4-expert model, in whose place the 8-expert model has its own"
_EXPERTS: dict[Layout, tuple[Rule, ...]] = {
    "plain": _expert_rules("gate", "experts"),
    "deepspeed": (
        *_expert_rules("deepspeed_moe.gate.wg", "deepspeed_moe.experts.deepspeed_experts"),
        Rule("model.layers.{layer}.mlp.gate.weight", None, reason=_OTHER_EXPERTS),
        Rule("model.layers.{layer}.mlp.experts.{rest}", None, reason=_OTHER_EXPERTS),
    ),
}

# One Linear, or Linears at the even places of a sequence with GELU between them.
_PROJECTOR = (
    *(Rule(f"{PROJECTOR}{2 * i}.{{parameter}}", f"model.image_connector.layers.{i}.{{parameter}}") for i in range(16)),
    Rule(PROJECTOR + "{parameter}", "model.image_connector.layers.0.{parameter}"),
)

_WHISPER = (
    Rule("model.query_tokens", "model.speech_connector.query_tokens"),
    Rule(
        ALIGNER + "decoder.audio_decoder.embed_tokens.weight",
        None,
        reason="word embeddings of the query decoder, which reads queries and never words",
    ),
    Rule(ALIGNER + "decoder.audio_decoder.{rest}", "model.speech_connector.decoder.{rest}"),
    Rule(ALIGNER + "projector.{parameter}", "model.speech_connector.projector.{parameter}"),
    Rule(AUDIO_TOWER + "{rest}", "model.speech_tower.{rest}"),
    Rule("model.audio_tower.encoder.{rest}", None, reason="a copy of Whisper that the original builds and never runs"),
    Rule("model.audio_tower.decoder.{rest}", None, reason="a copy of Whisper that the original builds and never runs"),
)

_BEATS = (
    Rule(ALIGNER + "query_tokens", "model.sound_connector.query_tokens"),
    Rule(ALIGNER + "qformer.qformer.{rest}", "model.sound_connector.qformer.{rest}"),
    Rule(ALIGNER + "projector.{parameter}", "model.sound_connector.projector.{parameter}"),
    Rule(
        AUDIO_TOWER + "encoder.pos_conv.0.weight_g", "model.audio_tower.encoder.pos_conv.weight", "weight_norm", 0, 2
    ),
    Rule(
        AUDIO_TOWER + "encoder.pos_conv.0.weight_v", "model.audio_tower.encoder.pos_conv.weight", "weight_norm", 1, 2
    ),
    Rule(AUDIO_TOWER + "encoder.pos_conv.0.bias", "model.audio_tower.encoder.pos_conv.bias"),
    Rule(
        AUDIO_TOWER + "encoder.layers.{layer}.self_attn.relative_attention_bias.weight",
        "model.audio_tower.encoder.relative_attention_bias.weight",
        "shared",
    ),
    Rule(
        AUDIO_TOWER + "predictor.{rest}", None, reason="the classifier of a fine-tuned BEATs, which no model here uses"
    ),
    Rule(
        AUDIO_TOWER + "predictor_dropout.{rest}",
        None,
        reason="the classifier of a fine-tuned BEATs, which no model here uses",
    ),
    Rule(AUDIO_TOWER + "{rest}", "model.audio_tower.{rest}"),
)


def rules_for(audio: AudioKind, vision_prefix: str, layout: Layout = "plain") -> tuple[Rule, ...]:
    """The rules of the variants with one audio side; the first that fits a name holds.

    Args:
        vision_prefix: what the vision tower's tensors start with in ours, see `vision_prefix`.
    """
    vision = (
        Rule(
            VISION_TOWER + "vision_model.embeddings.position_ids",
            None,
            reason="computed from the configuration: 0, 1, 2, ...",
        ),
        Rule(VISION_TOWER + "vision_model.{rest}", vision_prefix + "{rest}"),
    )
    return (*_DECODER, *_EXPERTS[layout], *_PROJECTOR, *vision, *(_WHISPER if audio == "whisper" else _BEATS))


def vision_prefix(our_names: Iterable[str]) -> str:
    """Start of the vision tower's names among ours: releases of transformers differ in an inner module."""
    nested = "model.vision_tower.vision_model."
    return nested if any(name.startswith(nested) for name in our_names) else "model.vision_tower."


@dataclass(frozen=True)
class Place:
    """Where a tensor of the original goes: into `target`, in `slot` (layer or expert, and part of it)."""

    rule: Rule
    target: str
    slot: tuple[int, int]


@dataclass(frozen=True)
class Target:
    """One of our tensors and the original ones that it is made of, in their order."""

    name: str
    how: str
    sources: tuple[str, ...]
    places: tuple[Place, ...]

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The shape that the sources give. Raises ConversionError when they do not fit together."""
        found = {place.slot: tuple(shapes[name]) for name, place in zip(self.sources, self.places, strict=True)}
        sizes = set(found.values())
        if self.how == "weight_norm":
            direction = found.get((0, 1), ())
            if set(found) != {(0, 0), (0, 1)} or found[0, 0] != (1,) * (len(direction) - 1) + direction[-1:]:
                raise self._misfit(shapes, "need one magnitude for each last index of the direction")
            return direction
        if len(sizes) != 1:
            raise self._misfit(shapes, "differ in shape")
        size = sizes.pop()
        if self.how != "expert":
            return size
        experts, parts = 1 + max(slot[0] for slot in found), self.places[0].rule.parts
        wanted = set(itertools.product(range(experts), range(parts)))
        if set(found) != wanted:
            expert = min(wanted - set(found))[0]
            raise ConversionError(f"{self.name} lacks weights of expert {expert}: {_listed(self.sources)} are there.")
        return (experts, parts * size[0], *size[1:])

    def pieces(self, read: Callable[[str], torch.Tensor]) -> tuple[Callable[[], torch.Tensor], ...]:
        """What makes the tensor, to be called in turn; their values follow each other in its memory."""
        if self.how == "weight_norm":
            return (lambda: fold_weight_norm(*(read(name) for name in self.sources)),)
        if self.how == "shared":
            return (lambda: self._the_same(read),)
        return tuple(lambda name=name: read(name) for name in self.sources)

    def _the_same(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        first = read(self.sources[0])
        for name in self.sources[1:]:
            if not torch.equal(read(name), first):
                raise ConversionError(f"{name} differs from {self.sources[0]}; Uni-MoE's layers share one such table.")
        return first

    def _misfit(self, shapes: Mapping[str, Shape], what: str) -> ConversionError:
        listed = ", ".join(f"{name} {list(shapes[name])}" for name in self.sources[:4])
        return ConversionError(f"The tensors of {self.name} {what}: {listed}. The checkpoint is damaged.")


@dataclass(frozen=True)
class Mapped:
    """What a set of original names becomes: our tensors by name, what is dropped and why, and what no rule knows."""

    targets: dict[str, Target]
    dropped: dict[str, str]
    unexpected: tuple[str, ...]


class KeyMap:
    """The rules of one model."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)

    def find(self, original: str) -> tuple[Rule, Place | None] | None:
        """The rule for a name and, unless it drops the tensor, its place; None where no rule fits."""
        for rule in self.rules:
            match = rule.original_pattern.fullmatch(original)
            if match is None:
                continue
            if rule.ours is None:
                return rule, None
            fields = match.groupdict()
            major = fields.get("expert") if rule.how == "expert" else fields.get("layer")
            slot = (int(major or 0) if rule.how in ("expert", "shared") else 0, rule.part)
            return rule, Place(rule, rule.ours.format(**fields), slot)
        return None

    def place(self, original: str) -> Place:
        """The place of a tensor that is taken over. Raises KeyError for any other name."""
        found = self.find(original)
        if found is None or found[1] is None:
            raise KeyError(original)
        return found[1]

    def map(self, originals: Iterable[str]) -> Mapped:
        """Sort names into targets, dropped and unexpected ones.

        Raises:
            ConversionError: two names become the same tensor of ours.
        """
        placed: dict[str, list[tuple[tuple[int, int], str, Place]]] = {}
        dropped, unexpected = {}, []
        for name in originals:
            found = self.find(name)
            if found is None:
                unexpected.append(name)
            elif found[1] is None:
                dropped[name] = found[0].reason
            else:
                placed.setdefault(found[1].target, []).append((found[1].slot, name, found[1]))
        targets = {}
        for ours, entries in placed.items():
            entries.sort(key=lambda entry: entry[0])
            if (
                len({entry[0] for entry in entries}) != len(entries)
                or len({entry[2].rule.how for entry in entries}) > 1
            ):
                raise ConversionError(
                    f"{_listed(entry[1] for entry in entries)} all become {ours}; only one may be there."
                )
            names, places = tuple(entry[1] for entry in entries), tuple(entry[2] for entry in entries)
            targets[ours] = Target(ours, places[0].rule.how, names, places)
        return Mapped(targets, dropped, tuple(unexpected))

    def originals(self, ours: str, experts: int = 1, layers: int = 1) -> list[str]:
        """The original names of one of our tensors; `experts` and `layers` say how many share a fused or shared one."""
        names: list[str] = []
        first: Rule | None = None
        for rule in self.rules:
            match = rule.our_pattern.fullmatch(ours) if rule.ours is not None else None
            # Rules that share a target are the parts of it; a later, wider rule that also fits is not meant.
            if match is None or (first is not None and (rule.ours, rule.how) != (first.ours, first.how)):
                continue
            if first is not None and rule.how == "copy":
                continue
            first = first or rule
            fields = match.groupdict()
            if rule.how == "expert":
                names += [rule.original.format(**fields, expert=i) for i in range(experts)]
            elif rule.how == "shared":
                names += [rule.original.format(**fields, layer=i) for i in range(layers)]
            else:
                names.append(rule.original.format(**fields))
        return names

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our tensors, made of original ones in memory.

        Raises:
            ConversionError: a name is unknown, or tensors do not fit together.
        """
        mapped = self.map(tensors)
        if mapped.unexpected:
            raise ConversionError(f"Uni-MoE has no tensor {_listed(mapped.unexpected)}.")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        made = {}
        for name, target in mapped.targets.items():
            flat = [piece().reshape(-1) for piece in target.pieces(tensors.__getitem__)]
            made[name] = torch.cat(flat).view(target.shape(shapes))
        return made


def take(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """The part of one of our tensors (or of its gradient) that one original tensor became; not for weight norms."""
    if place.rule.how != "expert":
        return tensor
    rows = tensor.shape[1] // place.rule.parts
    return tensor[place.slot[0], place.slot[1] * rows : (place.slot[1] + 1) * rows]


def fold_weight_norm(magnitude: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """g * v / |v|, the norm over all but the last dimension; in float32."""
    direction, magnitude = direction.float(), magnitude.float()
    return direction * (magnitude / weight_norm_magnitude(direction))


def weight_norm_magnitude(direction: torch.Tensor) -> torch.Tensor:
    """|v| over all but the last dimension, in float32; as the magnitude of v it leaves v as it is."""
    return direction.float().norm(dim=tuple(range(direction.dim() - 1)), keepdim=True)


def _compiled(template: str) -> re.Pattern[str]:
    pieces = _FIELD.split(template)
    literal, names = pieces[::2], pieces[1::2]
    fields = [_FIELDS[name] for name in names]
    return re.compile("".join(re.escape(a) + b for a, b in itertools.zip_longest(literal, fields, fillvalue="")))


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
