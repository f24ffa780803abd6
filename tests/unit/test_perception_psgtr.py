"""PSGTR on transformers' DETR computes what the original's layout means, and its checkpoint is converted or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import psgtr_reference as reference
import pytest
import torch

from unimoe import cli
from unimoe.conversion.released.import_psgtr import convert_psgtr
from unimoe.errors import ConversionError
from unimoe.processing.perception.psgtr_model import PsgtrForSceneGraphs
from unimoe.processing.perception.results import Perception
from unimoe.processing.perception.scene_graph_psgtr import PsgtrRelator

IMAGES = [PIL.Image.linear_gradient("L").resize((48, 36)), PIL.Image.new("L", (30, 40), 90)]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return reference.original_state()


@pytest.fixture(scope="module")
def converted(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command makes of a checkpoint as mmdetection saves it."""
    root = tmp_path_factory.mktemp("psgtr")
    torch.save({"meta": {"CLASSES": ("person",), "epoch": 60}, "state_dict": state}, root / "psgtr_r50.pth")
    assert cli.main(["convert", "psgtr", str(root / "psgtr_r50.pth"), "--out", str(root / "out")]) == 0
    return root / "out"


@torch.no_grad()
def test_heads_are_those_of_the_original_layout(converted: Path, state: dict[str, torch.Tensor]) -> None:
    model = PsgtrForSceneGraphs.from_pretrained(converted).eval()
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 64:] = padding[1, 32:] = True
    pixels[padding[:, None].expand_as(pixels)] = 0
    ours = model(pixels, (~padding).float())
    for name, expected in reference.original_heads(state, pixels, padding).items():
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_names_come_from_the_sizes(converted: Path) -> None:
    config = PsgtrForSceneGraphs.from_pretrained(converted).config
    assert (config.id2label[0], config.id2label[132], config.predicates[0]) == ("person", "rug-merged", "over")


def test_graphs_do_not_depend_on_the_batch(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import unimoe.processing.perception.psgtr_postprocess as postprocess

    monkeypatch.setattr(postprocess, "MIN_OBJECT_SCORE", 0.0)
    monkeypatch.setattr(postprocess, "MIN_RELATION_SCORE", 0.0)
    relator = PsgtrRelator(converted, short_side=32, batch_size=4, max_relations=3)
    images = [image.convert("RGB") for image in (*IMAGES, IMAGES[0])]
    seen = [Perception(*image.size) for image in images]
    together = relator.relate(images, seen)
    for graph, image, one in zip(together, images, seen, strict=True):
        (alone,) = relator.relate([image], [one])
        assert alone.objects == graph.objects
        for relation, other in zip(alone.relations, graph.relations, strict=True):
            assert replace(relation, score=0) == replace(other, score=0)
            assert relation.score == pytest.approx(other.score, abs=1e-4)
    assert together[0].objects == together[2].objects
    for graph, image in zip(together, images, strict=True):
        assert graph.source == "psgtr"
        assert 1 <= len(graph.relations) <= 3
        for one in graph.objects:
            assert 0 <= one.bounds[0] < one.bounds[2] <= image.width
            assert 0 <= one.bounds[1] < one.bounds[3] <= image.height


def test_the_original_swaps_red_and_blue(converted: Path) -> None:
    image = PIL.Image.new("RGB", (40, 40), (250, 10, 60))
    ours, original = (PsgtrRelator(converted, short_side=32, legacy=legacy) for legacy in (False, True))
    assert original.identity() != ours.identity()
    swapped = PIL.Image.merge("RGB", image.split()[::-1])
    assert torch.equal(original._pixels(image), ours._pixels(swapped))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("bbox_head.transformer.decoder.post_norm.weight"), "post_norm.weight"),
        (lambda s: s.update({"bbox_head.something.weight": torch.zeros(1)}), "bbox_head.something.weight"),
        (lambda s: s.update({"bbox_head.input_proj.bias": torch.zeros(3)}), "input_proj.bias"),
        (lambda s: s.pop("bbox_head.rel_cls_embed.weight"), "no checkpoint of PSGTR"),
    ],
)
def test_other_checkpoints_are_refused(
    change: Any, words: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    broken = dict(state)
    change(broken)
    torch.save({"state_dict": broken}, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match=words):
        convert_psgtr(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match="never run"):
        convert_psgtr(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
