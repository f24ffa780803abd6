"""Object detection by models of transformers: open vocabulary (OWLv2, OWL-ViT, Grounding DINO, OmDet-Turbo, ...), which look
for names that they are given, and closed (DETR, RT-DETR, D-FINE, ...), which know their own classes."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..media_policy_unimoe import OptionError
from .class_names import open_vocabulary_names
from .interface import Images
from .limits import best
from .pretrained import Pretrained, accepted, batches, in_float32
from .results import Box

ORIGINAL_MODEL = "google/owlv2-base-patch16-ensemble"
# They take one vector per name, so that names are read once, and any number of them fits.
_OWL_FAMILY = {"owlv2": "owlv2", "owlvit": "owlvit"}
_NAMES_PER_PASS = 256


class TransformersDetector:
    """Detects objects.

    Args:
        model: Hub id or folder; its configuration says whether its vocabulary is open.
        names: what an open-vocabulary model looks for. None: the original's 1847 names for the OWL family; others must be
            told.
        threshold: of a box's score; what is told is decided later, by `Verbalization`.
        max_boxes: per image, those of highest score.
        names_per_pass: of open-vocabulary models outside the OWL family, whose prompts are short.
        device, dtype, batch_size: of the model.

    Raises:
        OptionError: names for a closed model, or none for an open one that needs them.
        PartError: the model cannot be had. Both when the first images come or its identity is asked for.
    """

    def __init__(
        self,
        model: str | Path = ORIGINAL_MODEL,
        names: Sequence[str] | None = None,
        threshold: float = 0.1,
        max_boxes: int = 100,
        names_per_pass: int = 30,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 4,
    ) -> None:
        self.pretrained = Pretrained(model, device, dtype)
        self.names = None if names is None else tuple(names)
        self.threshold = threshold
        self.max_boxes = max_boxes
        self.names_per_pass = names_per_pass
        self.batch_size = batch_size
        self._queries: torch.Tensor | None = None

    def identity(self) -> dict[str, Any]:
        """Model, names and settings."""
        settings = {"threshold": self.threshold, "max_boxes": self.max_boxes, "names": self._wanted_names()}
        return {"adapter": "detection", **self.pretrained.identity(), **settings}

    def detect(self, images: Images) -> list[tuple[Box, ...]]:
        """Objects per image, in pixels of the image."""
        find = self._closed if self._wanted_names() is None else self._open
        if self.pretrained.config.model_type in _OWL_FAMILY:
            find = self._owl
        found = [boxes for batch in batches(images, self.batch_size) for boxes in find(batch)]
        return [best(boxes, lambda box: box.score, self.max_boxes) for boxes in found]

    def _wanted_names(self) -> tuple[str, ...] | None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES as OPEN

        kind = self.pretrained.config.model_type
        if kind not in OPEN:
            if self.names is not None:
                raise OptionError(f"{self.pretrained.name} ({kind}) knows its own classes only: leave out the names.")
            return None
        if self.names is None and kind not in _OWL_FAMILY:
            raise OptionError(f"{self.pretrained.name} ({kind}) must be told the names to look for.")
        return open_vocabulary_names() if self.names is None else self.names

    @torch.no_grad()
    def _closed(self, images: Images) -> list[list[Box]]:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        processor = self.pretrained.processor(AutoImageProcessor)
        inputs = processor(images=list(images), return_tensors="pt")
        outputs = self.pretrained.model(AutoModelForObjectDetection)(**self.pretrained.on_device(inputs))
        found = processor.post_process_object_detection(
            in_float32(outputs), threshold=self.threshold, target_sizes=_sizes(images)
        )
        known = self.pretrained.config.id2label
        return [_boxes(one, [known[label] for label in one["labels"].tolist()]) for one in found]

    @torch.no_grad()
    def _owl(self, images: Images) -> list[list[Box]]:
        """The model's forward pass in its steps, with the names' vectors kept from the first one."""
        from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection

        names = self._wanted_names() or ()
        model = self.pretrained.model(AutoModelForZeroShotObjectDetection)
        processor = self.pretrained.processor(AutoImageProcessor)
        pixels = self.pretrained.on_device(processor(images=list(images), return_tensors="pt"))["pixel_values"]
        feature_map, _ = model.image_embedder(pixels)
        features = feature_map.flatten(1, 2)
        queries = self._name_vectors(names).expand(len(images), -1, -1)
        logits, _ = model.class_predictor(features, queries)
        outputs = SimpleNamespace(logits=logits.float(), pred_boxes=model.box_predictor(features, feature_map).float())
        found = processor.post_process_object_detection(outputs, threshold=self.threshold, target_sizes=_sizes(images))
        return [_boxes(one, [names[label] for label in one["labels"].tolist()]) for one in found]

    def _name_vectors(self, names: Sequence[str]) -> torch.Tensor:
        """[1, names, size]: what the model's own forward pass makes of the names."""
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        if self._queries is None:
            model = self.pretrained.model(AutoModelForZeroShotObjectDetection)
            base = getattr(model, _OWL_FAMILY[self.pretrained.config.model_type])
            tokens = self.pretrained.processor(AutoProcessor)(text=list(names), return_tensors="pt")
            vectors = []
            for start in range(0, len(names), _NAMES_PER_PASS):
                part = {k: v[start : start + _NAMES_PER_PASS] for k, v in tokens.items()}
                vectors.append(base.get_text_features(**self.pretrained.on_device(part)).pooler_output)
            joined = torch.cat(vectors)
            self._queries = (joined / joined.norm(dim=-1, keepdim=True))[None]
        return self._queries

    @torch.no_grad()
    def _open(self, images: Images) -> list[list[Box]]:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        processor = self.pretrained.processor(AutoProcessor)
        model = self.pretrained.model(AutoModelForZeroShotObjectDetection)
        finish = processor.post_process_grounded_object_detection
        found: list[list[Box]] = [[] for _ in images]
        for names in batches(self._wanted_names() or (), self.names_per_pass):
            asked = [list(names)] * len(images)
            inputs = processor(images=list(images), text=asked, return_tensors="pt")
            outputs = in_float32(model(**self.pretrained.on_device(inputs)))
            options = {
                "input_ids": inputs.get("input_ids"),
                "text_labels": asked,
                "threshold": self.threshold,
                "text_threshold": self.threshold,
                "target_sizes": _sizes(images),
            }
            for boxes, one in zip(found, finish(outputs, **accepted(finish, options)), strict=True):
                boxes += _boxes(one, one["text_labels"])
        return found


def _sizes(images: Images) -> list[tuple[int, int]]:
    return [(image.height, image.width) for image in images]


def _boxes(found: dict[str, Any], names: Sequence[str]) -> list[Box]:
    rows = zip(names, found["scores"].tolist(), found["boxes"].tolist(), strict=True)
    return [Box(str(name), score, tuple(bounds)) for name, score, bounds in rows if name]  # type: ignore[arg-type]
