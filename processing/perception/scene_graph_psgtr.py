"""Scene graphs by PSGTR, from a folder that `unimoe convert psgtr` wrote of the public checkpoint."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F

from .interface import Images
from .limits import best
from .pretrained import Pretrained, batches
from .psgtr_postprocess import INSTANCE_OFFSET, PsgtrHeads, postprocess_psgtr, scene_graph
from .results import Bounds, Perception, SceneGraph

SOURCE = "psgtr"
# The network sees images of this shorter side, unless the longer one would exceed its limit; multiples of the stride.
SHORT_SIDE, LONG_SIDE, STRIDE, MASK_STRIDE = 800, 1333, 32, 4
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class PsgtrRelator:
    """Finds objects and their relations.

    Args:
        model: folder, or Hub id, of a converted PSGTR.
        max_relations: per image, those of highest score.
        short_side: of the image that the network sees.
        map_side: the longer side of the map in which masks compete; larger ones cost memory for little.
        legacy: with the original's mistakes: red and blue swapped, and no relation of "wall-other-merged".
        device, dtype, batch_size: of the model; only images of one size share a batch, so that none changes another.

    Raises:
        PartError: the model cannot be had, when the first images come or its identity is asked for.
    """

    def __init__(
        self,
        model: str | Path,
        max_relations: int = 50,
        short_side: int = SHORT_SIDE,
        map_side: int = 512,
        legacy: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 2,
    ) -> None:
        self.pretrained = Pretrained(model, device, dtype)
        self.max_relations = max_relations
        self.short_side = short_side
        self.map_side = map_side
        self.legacy = legacy
        self.batch_size = batch_size

    def identity(self) -> dict[str, Any]:
        """Model and settings."""
        limits = {"max_relations": self.max_relations, "short_side": self.short_side, "map_side": self.map_side}
        return {"adapter": SOURCE, **self.pretrained.identity(), **limits, "legacy": self.legacy}

    def relate(self, images: Images, seen: Sequence[Perception]) -> list[SceneGraph]:
        """A graph per image; what others saw there is not used."""
        by_size = defaultdict(list)
        for i, image in enumerate(images):
            by_size[image.size].append(i)
        found: dict[int, SceneGraph] = {}
        for numbers in by_size.values():
            for batch in batches(numbers, self.batch_size):
                found |= zip(batch, self._relate([images[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(images))]

    @torch.no_grad()
    def _relate(self, images: Images) -> list[SceneGraph]:
        from .psgtr_model import PsgtrForSceneGraphs

        pixels = torch.stack([self._pixels(image) for image in images])
        height, width = pixels.shape[-2:]
        below, beside = -height % STRIDE, -width % STRIDE
        inputs = {
            "pixel_values": F.pad(pixels, (0, beside, 0, below)),
            "pixel_mask": F.pad(torch.ones(len(images), height, width), (0, beside, 0, below)),
        }
        model = self.pretrained.model(PsgtrForSceneGraphs)
        output = model(**self.pretrained.on_device(inputs))
        pairs = [(output.heads(i), image.size) for i, image in enumerate(images)]
        return [self._graph(heads, (height, width), size, model.config) for heads, size in pairs]

    def _pixels(self, image: PIL.Image.Image) -> torch.Tensor:
        """[3, H, W], resized and normalised."""
        rgb = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float()
        scale = min(self.short_side / min(image.size), self.short_side / SHORT_SIDE * LONG_SIDE / max(image.size))
        size = (int(image.height * scale + 0.5), int(image.width * scale + 0.5))
        resized = F.interpolate(rgb[None], size=size, mode="bilinear", align_corners=False)[0].round()
        if self.legacy:
            resized = resized.flip(0)
        return (resized - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]

    def _graph(self, heads: PsgtrHeads, seen: tuple[int, int], size: tuple[int, int], config: Any) -> SceneGraph:
        height, width = seen
        # Masks of the padding are cut off, so that they fit the image.
        rows, columns = -(-height // MASK_STRIDE), -(-width // MASK_STRIDE)
        sub_mask, obj_mask = heads.sub_mask[:, :rows, :columns], heads.obj_mask[:, :rows, :columns]
        heads = heads._replace(sub_mask=sub_mask, obj_mask=obj_mask)
        share = min(1.0, self.map_side / max(size))
        target = max(1, round(size[0] * share)), max(1, round(size[1] * share))
        scale = width / target[0], height / target[1]
        found = postprocess_psgtr(heads, seen, scale, keep_wall=not self.legacy)
        graph = scene_graph(
            (found.pan_labels + 1).tolist(),
            found.r_dists,
            found.pan_rel_pairs.tolist(),
            _bounds(found.pan_img.numpy(), (size[0] / target[0], size[1] / target[1])),
            SOURCE,
            tuple(config.id2label[i] for i in range(config.num_labels)),
            tuple(config.predicates),
        )
        if not graph.relations and not self.legacy:
            return SceneGraph((), (), SOURCE)  # the one object that the original makes up where it finds nothing
        relations = best(graph.relations, lambda relation: relation.score, self.max_relations)
        return SceneGraph(graph.objects, relations, SOURCE)


def _bounds(picture: np.ndarray, scale: tuple[float, float]) -> dict[int, Bounds]:
    """Boxes of the segments of a map, in pixels of the image."""
    found = {}
    for number in np.unique(picture // INSTANCE_OFFSET).tolist():
        rows, columns = np.nonzero(picture // INSTANCE_OFFSET == number)
        x, y = scale
        found[int(number)] = (
            float(columns.min() * x),
            float(rows.min() * y),
            float((columns.max() + 1) * x),
            float((rows.max() + 1) * y),
        )
    return found
