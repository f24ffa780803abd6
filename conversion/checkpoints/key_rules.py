"""Rules that pair the tensor names of a released model with ours. Data, read in both directions.

Names are templates: `{layer}` and `{expert}` stand for numbers, `{parameter}` for weight or bias, `{rest}` for anything.
Where several tensors make one of ours, `how` says in what way:

    copy         the tensor itself, or some of its rows
    rows         some of the rows of ours
    expert       one of the parts of one expert; the parts of all experts follow each other
    weight_norm  magnitude g and direction v of a convolution, folded into g * v / |v| over all but the last dimension
    shared       the same tensor under the name of every layer; it is taken once, and must be the same everywhere

A tensor of the original that several rules name in the same words is fused: each of them takes other rows of it.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from ...errors import ConversionError

Shape = tuple[int, ...]

_FIELDS = {
    "layer": r"(?P<layer>\d+)",
    "expert": r"(?P<expert>\d+)",
    "parameter": r"(?P<parameter>weight|bias)",
    "rest": r"(?P<rest>.+)",
}
_FIELD = re.compile(r"\{(\w+)\}")


class Rows(NamedTuple):
    """Rows `start` to `stop`, exclusive, of a tensor with `total` rows."""

    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class Rule:
    """One line of the map.

    Args:
        original, ours: templates; `ours` None drops the tensor, for `reason`.
        how: see the module's text.
        part, parts: which of how many pieces of one expert, of one weight-normed tensor, or of ours ("rows") this is.
        taken: the rows of the original that are meant; None takes all.
        filled: "rows" only: the rows of ours that they become.
        experts: "expert" only: those of ours that the template stands for; None means all.
    """

    original: str
    ours: str | None
    how: Literal["copy", "rows", "expert", "weight_norm", "shared"] = "copy"
    part: int = 0
    parts: int = 1
    reason: str = ""
    taken: Rows | None = None
    filled: Rows | None = None
    experts: range | None = None

    @cached_property
    def original_pattern(self) -> re.Pattern[str]:
        return _compiled(self.original)

    @cached_property
    def our_pattern(self) -> re.Pattern[str]:
        return _compiled(self.ours or r"")

    def place(self, fields: Mapping[str, str]) -> "Place":
        """Where an original goes whose name has these fields."""
        if self.how == "expert":
            major = int(fields.get("expert") or 0) + (self.experts.start if self.experts is not None else 0)
        else:
            major = int(fields.get("layer") or 0) if self.how == "shared" else 0
        return Place(self, (self.ours or "").format(**fields), (major, self.part))

    def names(self, fields: Mapping[str, str], experts: int, layers: int) -> list[str]:
        """The originals of one of our tensors, whose name has these fields."""
        if self.how == "expert":
            count = experts if self.experts is None else len(self.experts)
            return [self.original.format(**fields, expert=i) for i in range(count)]
        if self.how == "shared":
            return [self.original.format(**fields, layer=i) for i in range(layers)]
        return [self.original.format(**fields)]

    def taken_shape(self, name: str, shape: Shape) -> Shape:
        """Shape of what is taken of an original. Raises ConversionError when it does not have the rows that it should."""
        if self.taken is None:
            return tuple(shape)
        if not shape or shape[0] != self.taken.total:
            raise ConversionError(
                f"{name} has shape {list(shape)}, but the sizes in config.json ask for {self.taken.total} rows. Weights and "
                "config.json do not belong together."
            )
        return (self.taken.stop - self.taken.start, *shape[1:])

    def taken_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.taken is None else tensor[self.taken.start : self.taken.stop]


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
        found = {
            place.slot: place.rule.taken_shape(name, shapes[name])
            for name, place in zip(self.sources, self.places, strict=True)
        }
        if self.how == "weight_norm":
            direction = found.get((0, 1), ())
            if set(found) != {(0, 0), (0, 1)} or found[0, 0] != (1,) * (len(direction) - 1) + direction[-1:]:
                raise self._misfit(shapes, "need one magnitude for each last index of the direction")
            return direction
        if self.how == "rows":
            return self._shape_of_rows(found, shapes)
        sizes = set(found.values())
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
        pairs = zip(self.sources, self.places, strict=True)
        return tuple(lambda name=name, place=place: place.rule.taken_of(read(name)) for name, place in pairs)

    def _shape_of_rows(self, found: Mapping[tuple[int, int], Shape], shapes: Mapping[str, Shape]) -> Shape:
        missing = set(range(self.places[0].rule.parts)) - {part for _, part in found}
        if missing:
            raise ConversionError(f"{self.name} lacks a part: only {_listed(self.sources)} are there.")
        for place in self.places:
            if place.rule.filled is None or found[place.slot][0] != place.rule.filled.stop - place.rule.filled.start:
                raise self._misfit(shapes, "have other numbers of rows than the configuration says")
        if len({shape[1:] for shape in found.values()}) != 1:
            raise self._misfit(shapes, "differ in shape")
        return (sum(shape[0] for shape in found.values()), *next(iter(found.values()))[1:])

    def _the_same(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        first = read(self.sources[0])
        for name in self.sources[1:]:
            if not torch.equal(read(name), first):
                raise ConversionError(
                    f"{name} differs from {self.sources[0]}; the layers of the original share one such table."
                )
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
    """The rules of one model; the first that fits a name holds, with those of the same template."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self._alike: dict[str, list[Rule]] = {}
        for rule in self.rules:
            self._alike.setdefault(rule.original, []).append(rule)

    def find(self, original: str) -> tuple[Rule, list[Place]] | None:
        """The rule for a name and, unless it drops the tensor, its places; None where no rule fits."""
        for rule in self.rules:
            match = rule.original_pattern.fullmatch(original)
            if match is None:
                continue
            if rule.ours is None:
                return rule, []
            return rule, [alike.place(match.groupdict()) for alike in self._alike[rule.original]]
        return None

    def places(self, original: str) -> list[Place]:
        """The places of a tensor that is taken over. Raises KeyError for any other name."""
        found = self.find(original)
        if found is None or not found[1]:
            raise KeyError(original)
        return found[1]

    def place(self, original: str) -> Place:
        """The place of a tensor that is not fused. Raises KeyError for any other name."""
        places = self.places(original)
        if len(places) > 1:
            raise KeyError(original)
        return places[0]

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
            elif not found[1]:
                dropped[name] = found[0].reason
            for place in found[1] if found is not None else []:
                placed.setdefault(place.target, []).append((place.slot, name, place))
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
            names += rule.names(match.groupdict(), experts, layers)
        return names

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our tensors, made of original ones in memory.

        Raises:
            ConversionError: a name is unknown, or tensors do not fit together.
        """
        mapped = self.map(tensors)
        if mapped.unexpected:
            raise ConversionError(f"The original has no tensor {_listed(mapped.unexpected)}.")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        made = {}
        for name, target in mapped.targets.items():
            flat = [piece().reshape(-1) for piece in target.pieces(tensors.__getitem__)]
            made[name] = torch.cat(flat).view(target.shape(shapes))
        return made

    def restore(self, original: str, ours: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The reverse: an original tensor from ours (or its gradient from theirs).

        Args:
            ours: from the name of one of our tensors to it.
        """
        places = self.places(original)
        if places[0].rule.how == "weight_norm" and places[0].rule.part == 0:
            return weight_norm_magnitude(ours(places[0].target))
        if len(places) == 1:
            return take(ours(places[0].target), places[0])
        places = sorted(places, key=lambda place: place.rule.taken or ())
        return torch.cat([take(ours(place.target), place) for place in places])


def take(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """The part of one of our tensors (or of its gradient) that one original tensor became; not for weight norms."""
    if place.rule.filled is not None:
        return tensor[place.rule.filled.start : place.rule.filled.stop]
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
