"""`unimoe convert compose` refuses what does not go together, and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import tiny_media
import tiny_parts
import torch

from unimoe import cli
from unimoe.conversion.composing.compose import ComposeOptions, Ingredients, plan_composition, run_composition
from unimoe.errors import ConversionError

SMALL = {"speech_tokens": 4, "sound_tokens": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_parts.every_part(tmp_path_factory.mktemp("parts"))


def test_wrong_parts_are_refused(parts: Path, tmp_path: Path) -> None:
    tiny_parts.text_encoder(tmp_path / "bert")
    tiny_media.image_processor().save_pretrained(tmp_path / "bert")
    (tmp_path / "notes.bin").write_bytes(b"")
    torch.save({"head.weight": torch.ones(2)}, tmp_path / "head.bin")
    torch.save({"model.mm_projector.0.weight": torch.ones(32, 32)}, tmp_path / "half.bin")
    torch.save(
        {"model.mm_projector.weight": torch.ones(32, 48), "model.mm_projector.bias": torch.ones(32)},
        tmp_path / "wide.bin",
    )
    beats = tiny_parts.beats_of(parts)
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"vision_tower": tmp_path / "bert"}, {}, "'bert' model, which does not take pictures"),
        ({"vision_tower": parts / "whisper"}, {}, "does not take pictures|preprocessor"),
        ({"vision_tower": tmp_path / "absent"}, {}, "is no folder"),
        ({"vision_tower": parts / "clip"}, {"vision_feature_layer": -9}, "has 4 hidden states"),
        ({"vision_tower": parts / "clip"}, {"image_size": 20}, "does not take pictures of 20 x 20"),
        ({"image_projector": tmp_path / "half.bin"}, {}, "add --vision-tower"),
        ({"vision_tower": parts / "clip", "image_projector": tmp_path / "head.bin"}, {}, "holds no image projector"),
        (
            {"vision_tower": parts / "clip", "image_projector": tmp_path / "half.bin"},
            {},
            "lacks the bias of its layer 0",
        ),
        ({"vision_tower": parts / "clip", "image_projector": tmp_path / "wide.bin"}, {}, "states of width 48"),
        ({"speech_tower": parts / "clip"}, {}, "describes a 'clip' model; 'whisper' is needed"),
        ({"speech_tower": parts / "whisper"}, {"window_seconds": 3}, r"choose a whole number 1\.\.2"),
        ({"speech_tower": parts / "whisper"}, {"speech_tokens": 17}, "the decoder has 16 positions"),
        ({"beats": tmp_path / "notes.bin"}, {}, "is empty"),
        ({"beats": tmp_path / "head.bin"}, {}, "is no BEATs checkpoint"),
        ({}, {"sound_connector": "mlp"}, "--sound-connector needs a tower"),
        ({}, {"image_size": 16}, "no part takes it: add --vision-tower"),
        ({}, {"window_seconds": 2}, "no part takes it: add --speech-tower or --beats"),
        ({"qformer_weights": tmp_path / "head.bin"}, {}, "There is no Q-Former"),
        ({**beats, "qformer_weights": tmp_path / "head.bin"}, {}, "does not hold"),
        ({}, {"chat_template": "alpaca"}, "use one of chatml, vicuna, llama, phi3"),
        ({}, {"chat_template": "llama"}, "ends answers with <|end_of_text|>"),
    ]
    for ingredients, options, message in wrong:
        files = ("beats", "qformer_config")
        given = {k: v if k in files else str(v) for k, v in ingredients.items()}
        with pytest.raises(ValueError, match=message.replace("|end_of_text|", r"\|end_of_text\|")):
            plan_composition(Ingredients(str(parts / "llama"), **given), ComposeOptions(**{**SMALL, **options}))


def test_a_sparse_language_model_and_one_without_tokenizer_are_refused(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    assert cli.main(["convert", "upcycle", str(parts / "llama"), "--out", str(out)]) == 0
    with pytest.raises(ConversionError, match="sparse already"):
        plan_composition(Ingredients(str(out)))
    tiny_parts.language_model(tmp_path / "mute")
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConversionError, match="holds no tokenizer"):
        plan_composition(Ingredients(str(tmp_path / "mute")))


def test_a_damaged_part_leaves_nothing_behind(parts: Path, tmp_path: Path) -> None:
    tiny_parts.vision_tower("siglip", tmp_path / "siglip")
    plan = plan_composition(Ingredients(str(parts / "llama"), vision_tower=str(tmp_path / "siglip")))
    weights = tmp_path / "siglip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConversionError, match="ends inside"):
        run_composition(plan, tmp_path / "dense", progress=False)
    assert not (tmp_path / "dense").exists()
