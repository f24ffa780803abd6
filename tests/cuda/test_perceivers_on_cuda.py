"""Vision models that look at images for mixers, on the stand-in for CUDA: tiny random ones of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psgtr_reference
import pytest
import tiny_vision
import torch
from cuda_stand_in import CUDA, CudaStandIn

from unimoe.conversion.released.import_psgtr import convert_psgtr
from unimoe.processing.perception import psgtr_postprocess
from unimoe.processing.perception.detection_transformers import TransformersDetector
from unimoe.processing.perception.results import Perception
from unimoe.processing.perception.scene_graph_psgtr import PsgtrRelator
from unimoe.processing.perception.segmentation_transformers import TransformersSegmenter

NOISE = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
IMAGES = [PIL.Image.fromarray(pixels) for pixels in NOISE]


def on_cuda(adapter: Any) -> None:
    """Moves a model that was loaded on the CPU: the stand-in cannot load."""
    adapter.pretrained.device = CUDA
    adapter.pretrained._model.to("cuda")
    adapter._queries = None


@pytest.mark.parametrize("kind", ["detr", "owlv2", "grounding_dino"])
def test_detectors(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    getattr(tiny_vision, f"save_{kind}")(tmp_path)
    names = None if kind == "detr" else tiny_vision.NAMES
    detector = TransformersDetector(tmp_path, names, threshold=0.0)
    expected = detector.detect(IMAGES)
    with CudaStandIn() as cuda:
        on_cuda(detector)
        cuda.waits.clear()
        found = detector.detect(IMAGES)
    for boxes, on_cpu in zip(found, expected, strict=True):
        # Random weights of Grounding DINO amplify roundings: without oneDNN a CPU is as far off.
        allowed = 2e-2 if kind == "grounding_dino" else 1e-4
        assert [box.score for box in boxes] == pytest.approx([box.score for box in on_cpu], abs=allowed)
    # Inputs go to the device; scores and boxes of each image come back in one piece each, and labels where they are numbers.
    waits = cuda.ours()
    assert waits.pop("detection_transformers.py:_boxes") == 2 * len(IMAGES)
    finder = {"detr": "_closed", "owlv2": "_owl", "grounding_dino": "_open"}[kind]
    labels = waits.pop(f"detection_transformers.py:{finder}", 0)
    assert labels == (0 if kind == "grounding_dino" else len(IMAGES))
    assert waits.keys() == {"pretrained.py:on_device"}


def test_a_segmenter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_vision.save_mask2former(tmp_path)
    segmenter = TransformersSegmenter(tmp_path, threshold=0.0, mask_threshold=0.5, overlap=0.0)
    expected = segmenter.segment(IMAGES)
    assert any(map_.segments for map_ in expected)
    with CudaStandIn() as cuda:
        on_cuda(segmenter)
        cuda.waits.clear()
        found = segmenter.segment(IMAGES)
    for map_, on_cpu in zip(found, expected, strict=True):
        assert np.array_equal(map_.ids, on_cpu.ids)
    assert cuda.ours() == {"pretrained.py:on_device": 2, "segmentation_transformers.py:_result": len(IMAGES)}


def test_a_relator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psgtr_postprocess, "MIN_OBJECT_SCORE", 0.0)
    monkeypatch.setattr(psgtr_postprocess, "MIN_RELATION_SCORE", 0.0)
    torch.save({"state_dict": psgtr_reference.original_state()}, tmp_path / "psgtr.pth")
    convert_psgtr(tmp_path / "psgtr.pth", tmp_path / "model")
    relator = PsgtrRelator(tmp_path / "model", short_side=32, max_relations=3)
    seen = [Perception(*image.size) for image in IMAGES]
    expected = relator.relate(IMAGES, seen)
    with CudaStandIn() as cuda:
        on_cuda(relator)
        cuda.waits.clear()
        graphs = relator.relate(IMAGES, seen)
    for graph, on_cpu in zip(graphs, expected, strict=True):
        assert len(graph.relations) == len(on_cpu.relations) > 0
    # Of each image its size and its pixels; of each kind of result one piece.
    assert cuda.ours() == {"pretrained.py:on_device": 2, "psgtr_model.py:heads": 7 * len(IMAGES)}
