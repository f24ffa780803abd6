"""From the raw heads of PSGTR to triplets and a panoptic map, as MoAI runs it (thresholds 0.5, 0.5 and 0.3).

Every query proposes a subject, an object and a predicate with a mask each. The best (query, predicate) pairs are taken,
pairs that say the same of the same masks are dropped, the confident rest is painted into one map, and masks of one
object are merged there; triplets stay whose subject and object can still be seen.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .class_names import coco_panoptic_names, psg_predicates
from .results import Bounds, GraphObject, Relation, SceneGraph

MAX_TRIPLETS = 100
# Classes from here on are stuff, of which an image has one segment each.
FIRST_STUFF = 80
# A pixel of the map is segment * INSTANCE_OFFSET + class.
INSTANCE_OFFSET = 1000
MASK_THRESHOLD, SAME_MASK_IOU = 0.85, 0.5
MIN_OBJECT_SCORE, MIN_RELATION_SCORE = 0.5, 0.3


class PsgtrHeads(NamedTuple):
    """Outputs of one image. Q queries, C object classes, P predicates; boxes are (centre x, y, width, height) in 0..1.

    sub_cls, obj_cls [Q, C + 1] logits, the last column is "nothing"; rel_cls [Q, P + 1] logits, the first column is "no
    relation"; sub_box, obj_box [Q, 4]; sub_mask, obj_mask [Q, h, w] logits.
    """

    sub_cls: torch.Tensor
    obj_cls: torch.Tensor
    rel_cls: torch.Tensor
    sub_box: torch.Tensor
    obj_box: torch.Tensor
    sub_mask: torch.Tensor
    obj_mask: torch.Tensor


@dataclass(frozen=True)
class PsgtrTriplets:
    """What is left of the heads. T triplets before, R after the thresholds and the map; S segments; classes from 0
    unless named 1-based (from 1).

    det_bboxes [2T, 5]: pixels of the original image and a score, all subjects and then all objects; complete_labels
    [2T], 1-based; rel_pairs [T, 2] rows of these; complete_r_labels [T] predicates, 1-based; complete_r_dists [T, P + 1];
    pan_img [H, W]: segment * 1000 + class; pan_labels [S]; pan_rel_pairs [R, 2] segments; r_labels [R], 1-based;
    r_dists [R, P + 1] probabilities; rels [R, 3]: pair and 1-based predicate. Where nothing was found there is one
    segment, of class 0; without a triplet `rels` is one row of zeros.
    """

    det_bboxes: torch.Tensor
    complete_labels: torch.Tensor
    rel_pairs: torch.Tensor
    complete_r_labels: torch.Tensor
    complete_r_dists: torch.Tensor
    pan_img: torch.Tensor
    pan_labels: torch.Tensor
    pan_rel_pairs: torch.Tensor
    r_labels: torch.Tensor
    r_dists: torch.Tensor
    rels: torch.Tensor


class _Candidates(NamedTuple):
    """Triplets, best relation first; subject and object stacked as [2, T, ...] where both have the field."""

    scores: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor
    relation_scores: torch.Tensor
    predicates: torch.Tensor
    predicate_probabilities: torch.Tensor

    def chosen(self, keep: torch.Tensor) -> "_Candidates":
        pairs, singles = self[:4], self[4:]
        return _Candidates(*(field[:, keep] for field in pairs), *(field[keep] for field in singles))


def postprocess_psgtr(
    heads: PsgtrHeads,
    input_size: tuple[int, int],
    scale: tuple[float, float],
    max_triplets: int = MAX_TRIPLETS,
    keep_wall: bool = False,
) -> PsgtrTriplets:
    """Triplets and map of one image.

    Args:
        input_size: (height, width) that the network saw, without padding.
        scale: that size by the original one, (of the width, of the height).
        max_triplets: how many (query, predicate) pairs are looked at.
        keep_wall: False drops every triplet with "wall-other-merged", as the original does by mistake (it compares
            numbers that count from 1 with one that counts from 0).
    """
    size = (round(input_size[0] / scale[1]), round(input_size[1] / scale[0]))
    candidates = _without_repetitions(_candidates(heads, size, max_triplets))
    confident = candidates.chosen(_is_confident(candidates, heads.sub_cls.shape[-1] - 1, keep_wall))
    picture, labels, pairs, seen = _painted(confident)
    predicates, probabilities = confident.predicates[seen], confident.predicate_probabilities[seen]
    number = len(candidates.predicates)
    rels = torch.cat([pairs, predicates[:, None]], dim=1) if len(pairs) else pairs.new_zeros(1, 3)
    if not len(labels):
        labels = labels.new_zeros(1)
    return PsgtrTriplets(
        det_bboxes=_pixel_boxes(candidates, input_size, scale),
        complete_labels=candidates.labels.flatten() + 1,
        rel_pairs=torch.arange(2 * number, dtype=torch.int).reshape(2, -1).T,
        complete_r_labels=candidates.predicates,
        complete_r_dists=candidates.predicate_probabilities,
        pan_img=picture,
        pan_labels=labels,
        pan_rel_pairs=pairs.int(),
        r_labels=predicates,
        r_dists=probabilities,
        rels=rels,
    )


def scene_graph(
    labels_from_1: Iterable[int],
    probabilities: torch.Tensor,
    pairs: Iterable[tuple[int, int]],
    bounds: dict[int, Bounds] | None = None,
    source: str = "psgtr",
    names: tuple[str, ...] | None = None,
    predicates: tuple[str, ...] | None = None,
) -> SceneGraph:
    """Objects and relations as plain data.

    Args:
        labels_from_1: classes of the objects, counted from 1.
        probabilities: [R, P + 1], of which the first column, "no relation", is not looked at.
        pairs: the R pairs of objects.
        bounds: boxes by number of object.
        names, predicates: of the classes; default: COCO's panoptic ones and PSG's.
    """
    names, predicates = names or coco_panoptic_names(), predicates or psg_predicates()
    objects = tuple(GraphObject(names[n - 1], (bounds or {}).get(i)) for i, n in enumerate(labels_from_1))
    relations = []
    for (subject, other), row in zip(pairs, probabilities[:, 1:], strict=True):
        best = int(row.argmax())
        relations.append(Relation(int(subject), int(other), predicates[best], float(row[best])))
    return SceneGraph(objects, tuple(relations), source)


def _candidates(heads: PsgtrHeads, size: tuple[int, int], max_triplets: int) -> _Candidates:
    relations = heads.rel_cls.softmax(-1)
    known = relations[:, 1:]
    scores, places = known.reshape(-1).topk(min(max_triplets, known.numel()))
    query = places // known.shape[1]
    object_scores, object_labels = torch.stack([heads.sub_cls, heads.obj_cls]).softmax(-1)[..., :-1].max(-1)
    # The original goes through float16 into bfloat16 and stays there: nearly equal logits tie, and the first mask wins.
    masks = [
        F.interpolate(m[query][:, None].half(), size=size)[:, 0].bfloat16() for m in (heads.sub_mask, heads.obj_mask)
    ]
    return _Candidates(
        scores=object_scores[:, query],
        labels=object_labels[:, query],
        boxes=torch.stack([heads.sub_box, heads.obj_box])[:, query],
        masks=torch.stack(masks),
        relation_scores=scores,
        predicates=places % known.shape[1] + 1,
        predicate_probabilities=relations[query],
    )


def _without_repetitions(candidates: _Candidates) -> _Candidates:
    """Drop triplets of the classes of a better one whose two masks cover the same."""
    kinds = defaultdict(list)
    for i, kind in enumerate(zip(*candidates.labels.tolist(), candidates.predicates.tolist(), strict=True)):
        kinds[kind].append(i)
    keep = torch.ones(len(candidates.predicates), dtype=torch.bool)
    binary = (candidates.masks.sigmoid() > MASK_THRESHOLD).flatten(2)
    for group in kinds.values():
        keep[group] = False
        keep[[first for first, *_ in _alike(group, binary)]] = True
    return candidates.chosen(keep)


def _alike(group: list[int], binary: torch.Tensor) -> list[list[int]]:
    """Members of a group, each under the first one that all its masks overlap; `binary` is [masks per member, N, pixels]."""
    masks = dict(zip(group, binary[:, group].float().unbind(1), strict=True))
    found = []
    while group:
        first, rest = group[0], group[1:]
        same = [_overlap(masks[first], masks[other]) for other in rest]
        found.append([first, *(member for member, is_same in zip(rest, same, strict=True) if is_same)])
        group = [member for member, is_same in zip(rest, same, strict=True) if not is_same]
    return found


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether masks [masks, pixels] of zeros and ones share more than half of what they cover, every one of them."""
    shared = (one * other).sum(-1)
    return bool((shared / (one.sum(-1) + other.sum(-1) - shared) > SAME_MASK_IOU).all())


def _is_confident(candidates: _Candidates, num_classes: int, keep_wall: bool) -> torch.Tensor:
    scores = (candidates.scores > MIN_OBJECT_SCORE).all(0) & (candidates.relation_scores > MIN_RELATION_SCORE)
    return scores if keep_wall else scores & (candidates.labels + 1 != num_classes - 1).all(0)


def _painted(triplets: _Candidates) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The map [H, W], classes of its segments, pairs of segments of the triplets that are seen, and which these are."""
    labels, masks = triplets.labels.flatten(), triplets.masks.flatten(0, 1)
    height, width = masks.shape[-2:]
    if not len(labels):
        return torch.ones(height, width, dtype=torch.long), labels, labels.view(-1, 2), labels.bool()
    flat = masks.flatten(1)
    owner = _merged(labels, flat.sigmoid() > MASK_THRESHOLD)
    on_top = owner[flat.T.softmax(-1).argmax(-1)]
    remaining, segment = on_top.unique(return_inverse=True)
    pairs = owner.reshape(2, -1).T
    seen = torch.isin(pairs, remaining).all(1)
    picture = segment * INSTANCE_OFFSET + labels[on_top]
    return picture.view(height, width), labels[remaining], torch.searchsorted(remaining, pairs[seen]), seen


def _merged(labels: torch.Tensor, binary: torch.Tensor) -> torch.Tensor:
    """Which mask every mask belongs to: the first of its class if that is stuff, the first that it overlaps otherwise."""
    owner, classes = torch.arange(len(labels)), defaultdict(list)
    for i, label in enumerate(labels.tolist()):
        classes[label].append(i)
    for label, members in classes.items():
        groups = [members] if label >= FIRST_STUFF else _alike(members, binary[None])
        for group in groups:
            owner[group] = group[0]
    return owner


def _pixel_boxes(candidates: _Candidates, input_size: tuple[int, int], scale: tuple[float, float]) -> torch.Tensor:
    height, width = input_size
    centre, extent = candidates.boxes.flatten(0, 1).split(2, dim=-1)
    corners = torch.cat([centre - 0.5 * extent, centre + 0.5 * extent], dim=-1)
    limits = corners.new_tensor([width, height, width, height])
    pixels = torch.minimum((corners * limits).clamp(min=0), limits) / corners.new_tensor([*scale, *scale])
    return torch.cat([pixels, candidates.scores.flatten()[:, None]], dim=-1)
