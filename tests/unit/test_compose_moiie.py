"""`unimoe convert compose` as runs/moiie_* call it: Phi-3 and SigLIP, in one scale or several, with Bunny's templates."""

from pathlib import Path
from typing import Any

import pytest
import tiny_media
import torch
from transformers import Phi3Config, Phi3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.composing.compose import ComposeOptions, Ingredients, plan_composition
from unimoe.conversion.released.bunny_processor import siglip_image_processor
from unimoe.errors import ConfigurationError, ConversionError
from unimoe.processing.processing_unimoe import UniMoeProcessor

HIDDEN = 32


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny Phi-3 with its tokenizer, and of a tiny SigLIP."""
    language, tower = (tmp_path_factory.mktemp(name) for name in ("phi3", "siglip"))
    tokenizer = tiny_media.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(language)
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=1,
        **sizes,
    )
    Phi3ForCausalLM(config).save_pretrained(language)
    vision = SiglipVisionConfig(num_attention_heads=2, image_size=8, patch_size=4, **sizes)
    SiglipVisionModel(vision).save_pretrained(tower)
    siglip_image_processor(8).save_pretrained(tower)
    return language, tower


@pytest.mark.parametrize("scales", [None, [1, 2]])
def test_the_folder_holds_both_and_answers(parts: tuple[Path, Path], scales: list[int] | None, tmp_path: Path) -> None:
    language, tower = parts
    command = ["convert", "compose", "--language-model", str(language), "--vision-tower", str(tower)]
    command += ["--chat-template", "phi3", "--image-aspect-ratio", "pad", *(["--scales", "1,2"] if scales else [])]
    assert cli.main([*command, "--out", str(tmp_path / "start")]) == 0
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "start").eval()
    processor = UniMoeProcessor.from_pretrained(tmp_path / "start")
    assert model.config.vision_scales == scales
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = Phi3ForCausalLM.from_pretrained(language).eval()(ids).logits
        torch.testing.assert_close(model(ids).logits[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)
    saved = SiglipVisionModel.from_pretrained(tower).state_dict()
    tower_state = model.model.vision_tower.state_dict()
    assert all(torch.equal(tower_state[name], tensor) for name, tensor in saved.items())
    connector = model.model.image_connector
    assert connector.layers[0].in_features == HIDDEN * len(scales or [1])
    assert 0.01 < connector.layers[0].weight.std().item() < 0.04
    question = [{"role": "user", "content": [{"type": "image", "image": tiny_media.picture()}, "What?"]}]
    batch = processor.apply_chat_template(
        question, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] > batch["input_ids"].shape[1]
    assert batch["pixel_values"].shape[-1] == 8 * max(scales or [1])
    assert set(processor.chat_template) == {"default", "plain"}
    assert processor.image_aspect_ratio == "pad"
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_what_cannot_work_is_named(parts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    language, tower = map(str, parts)
    with pytest.raises(ConversionError, match=r"--scales is \[1, 2\], but no part takes it: add --vision-tower"):
        plan_composition(Ingredients(language), ComposeOptions(vision_scales=[1, 2]))
    with pytest.raises(ConfigurationError, match=r"vision_scales is \[2, 1\]; give different multiples"):
        plan_composition(Ingredients(language, tower), ComposeOptions(vision_scales=[2, 1]))
    with pytest.raises(SystemExit):
        cli.main(["convert", "compose", "--language-model", language, "--out", "out", "--scales", "1,x"])
    assert "'1,x' is no list of whole numbers" in capsys.readouterr().err
