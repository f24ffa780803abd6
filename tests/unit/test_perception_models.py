"""Adapters of transformers' vision models, on tiny random ones: results in pixels, names, limits, batches, dtypes."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny_vision
import torch
from transformers import AutoImageProcessor

from unimoe.errors import OptionError, PartError
from unimoe.processing.perception.detection_transformers import TransformersDetector
from unimoe.processing.perception.segmentation_transformers import TransformersSegmenter

pytestmark = pytest.mark.skipif(
    "torchvision" in getattr(AutoImageProcessor, "_backends", ()),
    reason="this release of transformers wants torchvision",
)

IMAGES = [
    PIL.Image.linear_gradient("L").resize((48, 36)).convert("RGB"),
    PIL.Image.radial_gradient("L").resize((30, 44)).convert("RGB"),
]
EVERYTHING = {"threshold": 0.0, "mask_threshold": 0.5, "overlap": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    for name in ("mask2former", "detr", "owlv2", "grounding_dino"):
        getattr(tiny_vision, f"save_{name}")(root / name)
    return root


def test_segments_cover_pixels_and_have_the_models_names(folder: Path) -> None:
    maps = TransformersSegmenter(folder / "mask2former", **EVERYTHING).segment(IMAGES)
    assert any(one.segments for one in maps)
    for found, image in zip(maps, IMAGES, strict=True):
        assert found.ids.shape == (image.height, image.width)
        assert set(np.unique(found.ids)) - {0} <= {segment.id for segment in found.segments}
        assert all(s.name == tiny_names()[s.label] and s.id > 0 for s in found.segments)


def tiny_names() -> list[str]:
    return ["sky-other-merged", "person", "tree-merged", "car", "grass-merged"]


def test_the_largest_segments_are_kept(folder: Path) -> None:
    full = TransformersSegmenter(folder / "mask2former", **EVERYTHING).segment(IMAGES)
    one = TransformersSegmenter(folder / "mask2former", max_segments=1, **EVERYTHING).segment(IMAGES)
    for found, kept in zip(full, one, strict=True):
        sizes = {segment.id: int((found.ids == segment.id).sum()) for segment in found.segments}
        if sizes:
            assert [s.id for s in kept.segments] == [max(sizes, key=sizes.__getitem__)]
            assert set(np.unique(kept.ids)) <= {0, kept.segments[0].id}


@pytest.mark.parametrize("model", ["detr", "owlv2", "grounding_dino"])
def test_boxes_are_the_same_alone_and_in_batches(folder: Path, model: str) -> None:
    names = None if model == "detr" else tiny_vision.NAMES
    images = [IMAGES[0], IMAGES[0].rotate(180)]
    detector = TransformersDetector(folder / model, names, threshold=0.0, max_boxes=3, batch_size=2)
    together = detector.detect(images)
    known = set(names or ("cat", "dog", "LABEL_2"))
    for boxes, image in zip(together, images, strict=True):
        assert 1 <= len(boxes) <= 3
        (alone,) = detector.detect([image])
        for one, other in zip(boxes, alone, strict=True):
            assert one.name in known or model == "grounding_dino"  # whose random answers are spans of the prompt
            assert one.name == other.name
            np.testing.assert_allclose((one.score, *one.bounds), (other.score, *other.bounds), rtol=1e-4, atol=1e-3)


def test_names_are_read_once_and_mean_what_the_whole_model_says(folder: Path) -> None:
    """The steps of the OWL family against its own forward pass and post-processing."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder / "owlv2").eval()
    processor = AutoProcessor.from_pretrained(folder / "owlv2")
    asked = [list(tiny_vision.NAMES)]
    with torch.no_grad():
        outputs = model(**processor(images=IMAGES[:1], text=asked, return_tensors="pt"))
    size = [(IMAGES[0].height, IMAGES[0].width)]
    (expected,) = processor.post_process_grounded_object_detection(outputs, 0.0, size, asked)
    (found,) = TransformersDetector(folder / "owlv2", tiny_vision.NAMES, threshold=0.0).detect(IMAGES[:1])
    assert [box.name for box in found] == expected["text_labels"]
    torch.testing.assert_close(torch.tensor([box.bounds for box in found]), expected["boxes"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor([box.score for box in found]), expected["scores"], rtol=1e-4, atol=1e-5)


def test_half_precision_runs(folder: Path) -> None:
    boxes = TransformersDetector(folder / "detr", threshold=0.0, dtype="bfloat16").detect(IMAGES)
    assert all(np.isfinite(box.bounds).all() for found in boxes for box in found)


def test_identity_follows_weights_and_settings_and_loads_nothing(folder: Path, tmp_path: Path) -> None:
    detector = TransformersDetector(folder / "detr")
    assert detector.identity() == TransformersDetector(folder / "detr", device="cuda:7").identity()
    assert detector.pretrained._model is None
    assert detector.identity() != TransformersDetector(folder / "detr", threshold=0.3).identity()
    torch.manual_seed(1)
    tiny_vision.save_detr(tmp_path / "detr")
    assert detector.identity()["digest"] != TransformersDetector(tmp_path / "detr").identity()["digest"]


def test_vocabularies_are_told_or_known(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="own classes only"):
        TransformersDetector(folder / "detr", ["cat"]).detect(IMAGES)
    with pytest.raises(OptionError, match="must be told"):
        TransformersDetector(folder / "grounding_dino").detect(IMAGES)
    assert len(TransformersDetector(folder / "owlv2").identity()["names"]) == 1847
    with pytest.raises(PartError, match="cannot be loaded"):
        TransformersDetector(tmp_path).detect(IMAGES)


def test_devices_that_are_not_there_are_named(folder: Path) -> None:
    with pytest.raises(OptionError, match="no device"):
        TransformersDetector(folder / "detr", device="toaster")
    with pytest.raises(OptionError, match="cuda:99 is not there"):
        TransformersDetector(folder / "detr", device="cuda:99").detect(IMAGES)
    with pytest.raises(OptionError, match="no dtype"):
        TransformersSegmenter(folder / "mask2former", dtype="int8")
