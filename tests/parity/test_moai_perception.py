"""MoAI's verbalisation, post-processing of PSGTR, colour map and class names against golden data.

Each test takes the folders that hold its file, whatever their name and whatever else they hold. JSON files of lists
are compared entry by entry, with `cases.json` in the ledger.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import LEDGER, GoldenCase, GoldenMismatchError, _source, changeable_copy
from prompt_checks import require
from safetensors.torch import load_file, save_file

from unimoe.processing.perception import class_names
from unimoe.processing.perception.colour_map import bit_colours, original_map
from unimoe.processing.perception.psgtr_postprocess import PsgtrHeads, postprocess_psgtr, scene_graph
from unimoe.processing.perception.results import Box, Perception, Segment, Segmentation, TextLine
from unimoe.processing.perception.verbalize import (
    ORIGINAL,
    join_parts,
    relation_items,
    rounded,
    verbalize,
    verbalized_parts,
)

# Which field of a case's `texts` each part of ours is.
PARTS = {"segmentation": "seg", "detection": "od", "scene_graph": "sgg", "text": "ocr"}


def recorded_batches(case: GoldenCase) -> list[str]:
    """The batches of `cases.json` that hold raw outputs, what was said of them, and the size of their pictures."""
    return [
        name
        for name in case.json_or_empty("cases")
        if {"cv", "texts"} <= set(case.fields(name))
        and (case.has(f"{name}/panoptic_index_map") or "image_size" in case.config)
    ]


def has_names(case: GoldenCase) -> bool:
    return bool(set(OUR_NAMES) & set(case.json_or_empty("class_names")))


OUR_NAMES: dict[str, Callable[[], Any]] = {
    "coco_panoptic": class_names.coco_panoptic_names,
    "psg_predicates": class_names.psg_predicates,
    "open_world_ade20k_847": lambda: class_names.open_vocabulary_names()[:847],
    "open_world_imagenet_1000": lambda: class_names.open_vocabulary_names()[847:],
}
verbalization = pytest.mark.golden(texts="verbalization")
postprocessing = pytest.mark.golden("case*/in/*", file="psgtr_postprocess", texts="psgtr_postprocess")
raw_outputs = pytest.mark.golden(texts="cases", where=lambda case: bool(recorded_batches(case)))
names = pytest.mark.golden(texts="class_names", where=has_names)


# ---- verbalisation at the real size


@verbalization
@pytest.mark.parametrize("kind", ["segmentation", "detection", "scene_graph", "ocr"])
def test_moai_sentences_are_the_originals(golden_case: GoldenCase, kind: str) -> None:
    check_sentences(golden_case, golden_case.json("verbalization"), kind)


@verbalization
def test_moai_numbers_and_joins_are_the_originals(golden_case: GoldenCase) -> None:
    data = golden_case.json("verbalization")
    for entry in data.get("round2", []):
        equal(golden_case, f"round2 of {entry['value_float32']}", rounded(entry["value_float32"]), entry["text"])
    for entry in data.get("join", []):
        equal(golden_case, f"join of {entry['parts']}", join_parts(entry["parts"], legacy=True), entry["text"])


@verbalization
def test_moai_map_pictures_are_the_originals(golden_case: GoldenCase) -> None:
    data = golden_case.json("verbalization")
    if "panoptic_colormap" in data:
        equal(golden_case, "colours", bit_colours().tolist(), data["panoptic_colormap"]["rgb_0_255"])
    for entry in data.get("segmentation", []):
        picture = original_map(painted(entry, data["meta"]["image_size"]))
        where = entry["desc"]
        equal(golden_case, where, list(picture.shape), entry["panoptic_map_shape"])
        for point in entry["panoptic_map_points"]:
            equal(golden_case, where, picture[point["y"], point["x"]].tolist(), point["rgb"])
        np.testing.assert_allclose(picture.mean((0, 1)), entry["panoptic_map_mean_rgb"], rtol=1e-9)


@verbalization
@pytest.mark.parametrize("kind", ["segmentation", "detection", "scene_graph", "ocr"])
def test_moai_a_changed_sentence_fails(golden_case: GoldenCase, kind: str) -> None:
    data = copy.deepcopy(golden_case.json("verbalization"))
    entry = next((entry for entry in data.get(kind, []) if entry.get("text")), None)
    if entry is None:
        pytest.skip(f"{golden_case.name} has no text of {kind}")
    entry["text"] = entry["text"].replace("includes", "include")
    with pytest.raises(AssertionError):
        check_sentences(golden_case, data, kind)
    golden_case.comparisons += 1


# ---- PSGTR


@postprocessing
def test_moai_triplets_and_map_of_psgtr_are_the_originals(golden_case: GoldenCase) -> None:
    check_psgtr(golden_case)


@postprocessing
@pytest.mark.parametrize("part", ["pan_img", "rels", "det_bboxes"])
def test_moai_a_changed_triplet_fails(golden_case: GoldenCase, part: str, tmp_path: Path) -> None:
    name = next(iter(golden_case.names(f"*/out/{part}", "psgtr_postprocess")), None)
    if name is None:
        pytest.skip(f"{golden_case.name} has no {part}")
    file = changeable_copy(golden_case.path, tmp_path / "moai") / "psgtr_postprocess.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file)
    with pytest.raises(GoldenMismatchError, match=part):
        check_psgtr(GoldenCase(tmp_path / "moai", ledger=None))
    golden_case.comparisons += 1


# ---- end to end cases


@raw_outputs
def test_moai_texts_of_recorded_model_outputs_are_the_originals(golden_case: GoldenCase) -> None:
    for name in recorded_batches(golden_case):
        check_recorded(golden_case, name, golden_case.fields(name))


@pytest.mark.golden("*/panoptic_map_chw_0to1", "*/panoptic_index_map")
def test_moai_colour_map_is_the_originals(golden_case: GoldenCase) -> None:
    for stored in golden_case.names("*/panoptic_index_map"):
        name = stored.replace("panoptic_index_map", "panoptic_map_chw_0to1")
        if not golden_case.has(name):
            continue
        ids = golden_case.input(stored).long()
        pictures = torch.from_numpy(original_map(ids.numpy())).float().permute(0, 3, 1, 2)
        # It reaches the vision tower in half precision.
        expected = golden_case.input(name)
        golden_case.check(name, pictures.half().float() if bool((expected == expected.half()).all()) else pictures)


@names
def test_moai_class_names_are_the_originals(golden_case: GoldenCase) -> None:
    for kind, expected in golden_case.json("class_names").items():
        equal(golden_case, kind, list(OUR_NAMES[kind]()), expected)


# ---- the checks


def equal(case: GoldenCase, what: str, actual: Any, expected: Any) -> None:
    require(f"{case.name}: {what}", actual, expected)
    case.comparisons += 1


def check_sentences(case: GoldenCase, data: dict[str, Any], kind: str) -> None:
    size = data["meta"]["image_size"]
    for entry in data.get(kind, []):
        perception = PERCEPTIONS[kind](entry, size)
        part = {"ocr": "text"}.get(kind, kind)
        # Where the original raised an exception that nothing catches, ours says nothing.
        expected = entry["text"] if "raises" not in entry else ""
        equal(case, f"{kind}: {entry['desc']}", verbalized_parts(perception, ORIGINAL)[part], expected)
        if "clauses_sorted" in entry:
            clauses = sorted(relation_items(perception.scene_graph, ORIGINAL))
            equal(case, f"{kind}: {entry['desc']}", clauses, entry["clauses_sorted"])
        if "kept_labels" in entry:
            kept = [box.name for box in perception.boxes if box.score >= ORIGINAL.min_box_score]
            equal(case, f"{kind}: {entry['desc']}", kept, entry["kept_labels"])


def check_psgtr(case: GoldenCase) -> None:
    data = case.json("psgtr_postprocess")
    for entry in data["cases"]:
        prefix, file = f"case{entry['case']}", "psgtr_postprocess"
        if not case.has(*(f"{prefix}/in/{name}" for name in PsgtrHeads._fields), file=file):
            continue
        heads = PsgtrHeads(**{name: case.input(f"{prefix}/in/{name}", file) for name in PsgtrHeads._fields})
        size, scale = tuple(entry["img_shape"]), tuple(entry["scale_factor_wh"])
        found = postprocess_psgtr(heads, size, scale, len(heads.rel_cls))
        for name in case.names(f"{prefix}/out/*", file):
            case.check(name, getattr(found, name.rpartition("/")[2]), file=file)
        graph = scene_graph((found.pan_labels + 1).tolist(), found.r_dists, found.pan_rel_pairs.tolist())
        perception = Perception(size[1], size[0], scene_graph=graph)
        equal(case, f"{prefix}: text", verbalized_parts(perception, ORIGINAL)["scene_graph"], entry["text"])
        equal(case, f"{prefix}: labels", found.pan_labels.tolist(), entry["pan_labels"])
        equal(case, f"{prefix}: pairs", found.pan_rel_pairs.tolist(), entry["pan_rel_pairs"])
        equal(case, f"{prefix}: predicates", found.r_labels.tolist(), entry["r_labels_1based"])


def check_recorded(case: GoldenCase, name: str, entry: dict[str, Any]) -> None:
    maps = case.input(f"{name}/panoptic_index_map") if case.has(f"{name}/panoptic_index_map") else None
    for i, (seen, texts) in enumerate(zip(entry["cv"], entry["texts"], strict=True)):
        if maps is None:
            size = case.config["image_size"]
            ids = painted({"fill": 0, "rects": list(rectangles(seen["seg_rects_xyxy_px"]))}, size)
        else:
            ids = maps[i].numpy().astype(np.int32)
        perception = recorded(seen, ids)
        found = verbalized_parts(perception, ORIGINAL)
        for part, field in PARTS.items():
            if field in texts:
                equal(case, f"{name}: {field} of image {i}", found[part], texts[field])
        equal(case, f"{name}: aux of image {i}", verbalize(perception, ORIGINAL), texts["aux"])
    source = _source(case.path / "cases.json")
    LEDGER.compared.setdefault(source, set()).add(f"{name}.texts")
    LEDGER.read.setdefault(source, set()).add(f"{name}.cv")


def recorded(seen: dict[str, Any], ids: np.ndarray) -> Perception:
    """What the models of an end to end case answered."""
    height, width = ids.shape
    coco, vocabulary = class_names.coco_panoptic_names(), class_names.open_vocabulary_names()
    segments = tuple(Segment(i, coco[label], 1.0, label) for i, label in enumerate(seen["seg_label_ids"], 1))
    graph, found = seen["sgg"], seen["od"]
    distributions = torch.tensor(graph["rel_dists"]).reshape(-1, len(class_names.psg_predicates()) + 1)
    rows = zip(found["labels"], found["scores"], found["boxes"], strict=True)
    return Perception(
        width,
        height,
        Segmentation(ids, segments),
        tuple(Box(vocabulary[label], score, tuple(box)) for label, score, box in rows),
        scene_graph(graph["labels"], distributions, graph["rel_pair_idxes"]),
        tuple(TextLine(text, score) for _, (text, score) in seen["ocr"]),
    )


# ---- entries of verbalization.json as ours


def segmentation_of(entry: dict[str, Any], size: int) -> Perception:
    coco = class_names.coco_panoptic_names()
    segments = tuple(
        Segment(info["id"], coco[info["label_id"]], info["score"], info["label_id"]) for info in entry["segments_info"]
    )
    return Perception(size, size, segmentation=Segmentation(painted(entry, size), segments))


def painted(entry: dict[str, Any], size: int) -> np.ndarray:
    ids = np.full((size, size), entry["fill"], dtype=np.int32)
    for rect in entry["rects"]:
        ids[rect["y0"] : rect["y1"], rect["x0"] : rect["x1"]] = rect["id"]
    return ids


def rectangles(corners: list[list[int]]) -> Iterator[dict[str, int]]:
    for i, (x0, y0, x1, y1) in enumerate(corners, 1):
        yield {"id": i, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


def detection_of(entry: dict[str, Any], size: int) -> Perception:
    vocabulary = class_names.open_vocabulary_names()
    rows = zip(entry["labels"], entry["scores"], entry["boxes"], strict=True)
    return Perception(size, size, boxes=tuple(Box(vocabulary[label], score, tuple(box)) for label, score, box in rows))


def scene_graph_of(entry: dict[str, Any], size: int) -> Perception:
    distributions = torch.zeros(len(entry["rel_dists_nonzero"]), len(class_names.psg_predicates()) + 1)
    for row, values in zip(distributions, entry["rel_dists_nonzero"], strict=True):
        for column, value in values:
            row[column] = value
    return Perception(
        size, size, scene_graph=scene_graph(entry["labels_1based"], distributions, entry["rel_pair_idxes"])
    )


def lines_of(entry: dict[str, Any], size: int) -> Perception:
    lines = entry["lines"]
    found = None if lines is None else tuple(TextLine(line["text"], line["score"]) for line in lines)
    return Perception(size, size, lines=found)


PERCEPTIONS = {
    "segmentation": segmentation_of,
    "detection": detection_of,
    "scene_graph": scene_graph_of,
    "ocr": lines_of,
}
