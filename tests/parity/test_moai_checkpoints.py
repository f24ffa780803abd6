"""MoAI's checkpoints, tokenizer, prompts and masks against golden data, by way of the conversion."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from golden import GoldenCase
from moai_case import expand_images, is_moai, original_config, segment_colours
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from unimoe.conversion.released.import_moai import import_moai
from unimoe.conversion.released.moai_tokenizer import read_moai_tokenizer
from unimoe.processing.chat_templates_unimoe import MOAI_CHAT_TEMPLATES

# What a question of `cases.json` is asked with.
QUESTION = ("input_ids", "images_uint8", "panoptic_index_map")


def with_tokenizer(holds: Callable[[GoldenCase], Any]) -> pytest.MarkDecorator:
    """Cases with weights, a tokenizer and whatever else."""

    def serves(case: GoldenCase) -> bool:
        return is_moai(case) and (case.path / "tokenizer.model").is_file() and bool(holds(case))

    return pytest.mark.golden(weights="output.weight", where=serves)


def questions(case: GoldenCase) -> dict[str, dict[str, Any]]:
    """What `cases.json` says of the batches that can be asked again, by name."""
    named = {name: case.fields(name) for name in case.json_or_empty("cases")}
    return {
        name: fields
        for name, fields in named.items()
        if {"prompts", "texts"} <= set(fields) and case.has(*(f"{name}/{part}" for part in QUESTION))
    }


def import_case(case: GoldenCase, folder: Path) -> Path:
    """A golden case as a checkpoint of the original, imported; returns our folder."""
    original = folder / "original"
    original.mkdir(parents=True)
    (original / "config.json").write_text(json.dumps(original_config(case)), encoding="utf-8")
    save_file(case.weights, original / "model.safetensors")
    shutil.copyfile(case.path / "tokenizer.model", original / "tokenizer.model")
    import_moai(str(original), folder / "ours")
    return folder / "ours"


@pytest.fixture
def imported(golden_case: GoldenCase, tmp_path: Path) -> tuple[GoldenCase, Any, Path]:
    """A case, our processor of it and our folder."""
    folder = import_case(golden_case, tmp_path)
    return golden_case, AutoProcessor.from_pretrained(folder), folder


def picture(values: torch.Tensor) -> PIL.Image.Image:
    """[3, H, W] uint8 as a picture."""
    return PIL.Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).numpy()))


def conversations(case: GoldenCase, name: str, fields: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The questions of a batch with their pictures, aux texts and maps."""
    images = case.input(f"{name}/images_uint8")
    maps = (segment_colours(case.input(f"{name}/panoptic_index_map")) * 255).round().byte()
    return [
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "image": picture(image),
                        "aux": {"text": texts["aux"], "map": picture(colours)},
                    },
                    {"type": "text", "text": question},
                ],
            }
        ]
        for image, colours, texts, question in zip(images, maps, fields["texts"], fields["prompts"], strict=True)
    ]


@with_tokenizer(questions)
@torch.no_grad()
def test_moai_batches_from_messages(imported: tuple[GoldenCase, Any, Path]) -> None:
    """Messages in, the original's inputs and logits out."""
    case, processor, folder = imported
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.text_config.mixer_config.compress_aux_padding = True
    for name, fields in questions(case).items():
        inputs = processor.apply_chat_template(
            conversations(case, name, fields),
            chat_template="demo" if fields.get("demo") else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert torch.equal(inputs["input_ids"], expand_images(case, case.input(f"{name}/input_ids")))
        case.check_if_present(f"{name}/merged_attention_mask", inputs["attention_mask"])
        case.check_if_present(f"{name}/verb_input_ids", inputs["aux_input_ids"])
        text = inputs["aux_attention_mask"][:, : inputs["aux_input_ids"].shape[1]]
        case.check_if_present(f"{name}/verb_attention_mask_ignored_by_original", text)
        case.check_if_present(f"{name}/im_mask", inputs["mm_token_type_ids"] == 1)
        language = (inputs["mm_token_type_ids"] == 0) & inputs["attention_mask"].bool()
        case.check_if_present(f"{name}/lang_mask", language)
        case.check_if_present(f"{name}/pixel_values", inputs["pixel_values"])
        logits = model(**inputs).logits
        for stored in case.names(f"{name}/logits_fp32gate_last*"):
            case.check(stored, logits[:, -case._load(stored, "io").shape[1] :], rtol=1e-4)
        for field in {"prompts", "demo"} & set(fields):
            case._record("compared", "cases", f"{name}.{field}")
        case.comparisons += 1


@with_tokenizer(lambda case: case.json_or_empty("prompts").get("tokenizer"))
def test_moai_tokenizer(golden_case: GoldenCase) -> None:
    tokenizer = read_moai_tokenizer(golden_case.path)
    entries = golden_case.json("prompts")["tokenizer"]
    for entry in entries:
        assert tokenizer(entry["text"])["input_ids"] == entry["ids"], entry["text"]
        assert tokenizer(entry["text"], add_special_tokens=False)["input_ids"] == entry["ids_no_special"]
        assert tokenizer.decode(entry["ids"], skip_special_tokens=True) == entry["decoded_skip_special"]
    golden_case.comparisons += len(entries)


@with_tokenizer(lambda case: case.json_or_empty("prompts").get("prompts"))
def test_moai_prompts_and_masks(imported: tuple[GoldenCase, Any, Path]) -> None:
    case, processor, _ = imported
    side = processor.image_processor.size["height"]
    image = {"type": "image", "image": PIL.Image.new("RGB", (side, side))}
    for entry in case.json("prompts")["prompts"]:
        template = {"eval": MOAI_CHAT_TEMPLATES["default"], "demo": MOAI_CHAT_TEMPLATES["demo"]}.get(entry["kind"])
        if template is None:  # what opens every prompt
            ids = processor.tokenizer(entry["prompt"])["input_ids"]
            is_image = [token == processor.image_token_id for token in ids]
            mask = [int(one) for one in is_image for _ in range(entry["image_tokens"] if one else 1)]
            assert (mask, len(mask)) == (entry["im_mask"], entry["label_len"])
        else:
            messages = [{"role": "user", "content": [image, {"type": "text", "text": entry["question"]}]}]
            options = {"chat_template": template, "add_generation_prompt": True}
            assert processor.apply_chat_template(messages, **options) == f"<s>{entry['prompt']}"
            inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
            wanted = expand_images(case, torch.tensor([entry["input_ids"]]))
            assert inputs["input_ids"] == wanted.tolist()
            ones = [i for i, kind in enumerate(inputs["mm_token_type_ids"][0]) if kind == 1]
            assert [ones[0], ones[-1]] == entry["im_mask_ones"]
            assert len(inputs["input_ids"][0]) == entry["merged_len"] == entry["im_mask_len"]
        case.comparisons += 1
