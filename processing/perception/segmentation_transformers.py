"""Panoptic segmentation by any model of transformers' universal segmentation: Mask2Former, OneFormer, EoMT, DETR, ..."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .class_names import coco_panoptic_names
from .interface import Images
from .limits import best
from .pretrained import Pretrained, accepted, batches, in_float32
from .results import Segment, Segmentation

ORIGINAL_MODEL = "facebook/mask2former-swin-base-coco-panoptic"


class TransformersSegmenter:
    """Segments images.

    Args:
        model: Hub id or folder.
        threshold: of a segment's score; mask_threshold: of its pixels; overlap: the share of its pixels that no better
            segment took. These are the original's.
        max_segments: per image, the largest ones.
        device, dtype, batch_size: of the model.

    Raises:
        PartError: the model cannot be had, when the first images come or its identity is asked for.
    """

    def __init__(
        self,
        model: str | Path = ORIGINAL_MODEL,
        threshold: float = 0.5,
        mask_threshold: float = 0.95,
        overlap: float = 0.8,
        max_segments: int = 100,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 4,
    ) -> None:
        self.pretrained = Pretrained(model, device, dtype)
        self.thresholds = {
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "overlap_mask_area_threshold": overlap,
        }
        self.max_segments = max_segments
        self.batch_size = batch_size

    def identity(self) -> dict[str, Any]:
        """Model and settings."""
        own = {"adapter": "segmentation", "max_segments": self.max_segments}
        return {**own, **self.pretrained.identity(), **self.thresholds}

    def segment(self, images: Images) -> list[Segmentation]:
        """A map per image, of the image's size."""
        return [found for batch in batches(images, self.batch_size) for found in self._segment(batch)]

    @torch.no_grad()
    def _segment(self, images: Images) -> list[Segmentation]:
        from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, AutoProcessor

        needs_task = self.pretrained.config.model_type == "oneformer"
        processor = self.pretrained.processor(AutoProcessor if needs_task else AutoImageProcessor)
        task = {"task_inputs": ["panoptic"] * len(images)} if needs_task else {}
        inputs = processor(images=list(images), return_tensors="pt", **task)
        outputs = self.pretrained.model(AutoModelForUniversalSegmentation)(**self.pretrained.on_device(inputs))
        finish = processor.post_process_panoptic_segmentation
        sizes = [(image.height, image.width) for image in images]
        options = {**self.thresholds, "target_sizes": sizes, "label_ids_to_fuse": set()}
        found = finish(in_float32(outputs), **accepted(finish, options))
        return [self._result(one) for one in found]

    def _result(self, found: dict[str, Any]) -> Segmentation:
        ids = np.asarray(found["segmentation"].cpu(), dtype=np.int32)
        # Some families count from 0, with -1 for pixels of no segment.
        shift = int(any(info["id"] < 1 for info in found["segments_info"]))
        numbers, areas = np.unique(ids, return_counts=True)
        area = dict(zip(numbers.tolist(), areas.tolist(), strict=True))
        kept = best(found["segments_info"], lambda info: area.get(info["id"], 0), self.max_segments)
        segments = tuple(
            Segment(info["id"] + shift, self._name(info["label_id"]), float(info.get("score", 1.0)), info["label_id"])
            for info in kept
        )
        ids = np.maximum(ids + shift, 0)
        return Segmentation(np.where(np.isin(ids, [s.id for s in segments]), ids, 0).astype(np.int32), segments)

    def _name(self, label: int) -> str:
        """The class by the model's own names, or COCO's where it has 133 classes and none of its own."""
        names = self.pretrained.config.id2label
        own = names.get(label, f"LABEL_{label}")
        coco = coco_panoptic_names()
        return coco[label] if own == f"LABEL_{label}" and len(names) == len(coco) else own
