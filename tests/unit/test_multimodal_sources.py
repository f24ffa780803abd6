"""Models that see and write as sources: text has their logits, pictures too where our classes compute the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.checkpoints.checkpoint_reader import Checkpoint
from unimoe.conversion.dense.sources import load_dense, open_source
from unimoe.errors import ConversionError

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE = 90
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
CONFIGS: dict[str, Any] = {
    "llava": LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE
    ),
    "llava of mistral and siglip": LlavaConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=MistralConfig(**TEXT, sliding_window=24),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    "llava tied": LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        tie_word_embeddings=True,
    ),
    "llava-onevision": LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=91,
    ),
    "qwen2.5-vl": Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": QWEN_ROPE},
        vision_config=QWEN_TOWER,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    ),
}
SEES = ("llava", "llava of mistral and siglip", "llava tied")


def save(config: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "vision" in name or "projector" in name:
                parameter.mul_(5)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_text_has_the_logits_of_the_source(name: str, tmp_path: Path) -> None:
    model = save(CONFIGS[name], tmp_path / "dense", max_shard_size="30KB")
    source = open_source(str(tmp_path / "dense"))
    ours = load_dense(source)
    ids = torch.randint(3, 89, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(ids).logits - model(ids).logits).abs().max() <= 1e-5
    assert (source.config.image_connector is not None) == (name in SEES)
    accounted = source.keys_consumed + len(source.dropped)
    assert accounted == len(Checkpoint(tmp_path / "dense").tensors)


@pytest.mark.parametrize("original_names", [True, False])
@pytest.mark.parametrize("name", SEES)
def test_pictures_have_the_logits_of_the_source(name: str, original_names: bool, tmp_path: Path) -> None:
    model = save(CONFIGS[name], tmp_path / "dense", save_original_format=original_names)
    ours = load_dense(open_source(str(tmp_path / "dense")))
    ids = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8, *[IMAGE] * 4, 9]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        assert (ours(input_ids=ids, pixel_values=pixels).logits - expected).abs().max() <= 1e-5
        assert (model(input_ids=ids, pixel_values=-pixels).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_they_become_sparse(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(CONFIGS[name], tmp_path / "dense")
    (tmp_path / "dense" / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    out = tmp_path / "sparse"
    assert cli.main(["convert", "upcycle", str(tmp_path / "dense"), "--out", str(out), "--groups", "moiie"]) == 0
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["comparison"]["max_abs_logit_difference"] <= 1e-5 * max(1, receipt["comparison"]["max_abs_logit"])
    assert receipt["comparison"]["prompts"] == 1 + (name in SEES)
    assert ("the picture part is left out: " in capsys.readouterr().out) == (name not in SEES)
    assert not (out / "processor_config.json").exists()
    model = UniMoeForCausalLM.from_pretrained(out)
    assert model.config.text_config.sparse_layers == [1]
    assert model.generation_config.suppress_tokens == ([IMAGE] if name in SEES else None)
    assert (model.model.vision_tower is not None) == (name in SEES)


def save_processor(folder: Path, template: str | None) -> None:
    words = {"<unk>": 0, "USER": 5, "ASSISTANT": 6, "What": 7, "is": 8, "this": 9, "<image>": IMAGE}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<image>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)
    side = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=side, crop_size=side).save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}USER <image> {{ m.content[1].text }}{% endfor %}"])
def test_a_processor_goes_along(template: str | None, tmp_path: Path) -> None:
    model = save(CONFIGS["llava"], tmp_path / "dense")
    save_processor(tmp_path / "dense", template)
    assert cli.main(["convert", "upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "sparse")]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "sparse")
    picture = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == IMAGE).sum() == 4
    expected_pixels = CLIPImageProcessorPil.from_pretrained(tmp_path / "dense")(picture, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected_pixels["pixel_values"])
    if template is not None:
        assert inputs["input_ids"][0].tolist() == [5, *[IMAGE] * 4, 7, 8, 9]
    sparse = UniMoeForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    given = {name: inputs[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        assert (sparse(**given).logits - model(**given).logits).abs().max() <= 1e-5


def test_an_older_layout_of_names_is_read(tmp_path: Path) -> None:
    """Qwen2-VL's first files keep the decoder under `model.` and the tower under `visual.`."""
    model = save(CONFIGS["qwen2.5-vl"], tmp_path / "dense", save_original_format=True)
    names = set(Checkpoint(tmp_path / "dense").tensors)
    assert "model.layers.0.mlp.up_proj.weight" in names or "model.language_model.layers.0.mlp.up_proj.weight" in names
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = load_dense(open_source(str(tmp_path / "dense")))(ids).logits
        assert (logits - model(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision_feature_layer": [-2, -1]}, "joins the states of several layers"),
        ({"projector_hidden_act": "relu"}, "another activation than GELU"),
        ({"multimodal_projector_bias": False}, "or no biases"),
    ],
)
def test_picture_parts_that_differ_are_left_out_with_the_reason(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, **change
        ),
        tmp_path / "x",
    )
    source = open_source(str(tmp_path / "x"))
    assert source.config.image_connector is None
    assert any(reason in why for why in source.dropped.values())


def test_a_decoder_of_another_family_is_refused(tmp_path: Path) -> None:
    save(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER),
            text_config=GemmaConfig(**TEXT, head_dim=8),
            image_token_index=IMAGE,
        ),
        tmp_path / "x",
    )
    with pytest.raises(ConversionError, match="its norms add one"):
        open_source(str(tmp_path / "x"))
