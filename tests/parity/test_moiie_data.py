"""MoIIE's prompts, token ids, labels, modality ids and batches against golden data.

A case is a folder with `samples.json` (conversations and captions), whatever its name. It holds `prompts.json` (what
the original's templates made of them), one `tokenizer_<name>.json` per tokenizer, and tensors under
`<tokenizer>.<template>.<sample>.*`. Every tensor and every prompt is compared.
"""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import tiny_media
import torch
from golden import GoldenCase, GoldenMismatchError
from prompt_checks import captured_warnings, counts_in, require
from transformers import PreTrainedTokenizerFast

from unimoe.errors import DataError, PlaceholderError
from unimoe.processing.chat_templates_unimoe import BUNNY_SEPARATORS, BUNNY_VERSIONS, bunny_chat_template
from unimoe.processing.processing_unimoe import UniMoeProcessor, prepare_tokenizer
from unimoe.trainers.data.media_paths import MediaPaths
from unimoe.trainers.data.original_data import convert

IMAGE_INDEX = -200
SAMPLE_TENSORS = ("input_ids", "labels", "token_type_ids")
BATCH_TENSORS = (*SAMPLE_TENSORS, "attention_mask")


moiie_data = pytest.mark.golden("*.input_ids", texts="samples")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    PIL.Image.new("RGB", (8, 8)).save(folder / "image.png")
    return folder


@moiie_data
def test_moiie_prompts_tokens_labels_and_batches_are_the_originals(golden_case: GoldenCase, media: Path) -> None:
    check_all_samples(golden_case, media)
    for tokenizer, version in settings(golden_case):
        if version != "plain":
            check_inference(golden_case, tokenizer, version, media)
            check_batch(golden_case, tokenizer, version, media)


@moiie_data
def test_moiie_every_prompt_and_tensor_has_a_sample(golden_case: GoldenCase) -> None:
    data, known = golden_case.json("samples"), {"batch", "inference"}
    known |= {sample["name"] for sample in [*data["samples"], *data.get("plain", [])]}
    names = [*golden_case.names(), *(f"{name}.prompt" for name in prompts_of(golden_case))]
    for name in names:
        _, version, sample, tensor = name.split(".")
        assert version in BUNNY_VERSIONS, name
        assert sample in known, name
        assert tensor in (*BATCH_TENSORS, "prompt"), name
        golden_case.comparisons += 1


@moiie_data
def test_moiie_default_rules_agree_where_the_original_is_right(golden_case: GoldenCase, media: Path) -> None:
    for tokenizer, version in settings(golden_case):
        processor = processor_of(golden_case, tokenizer, version, "plain", 1)
        if version != "plain" and BUNNY_SEPARATORS[version][1] not in processor.tokenizer.get_added_vocab():
            continue  # what ends an answer is no token, so that the original may join it with what follows
        if processor.tokenizer.tokenize("x") != ["x"]:
            continue  # a tokenizer that puts a space before every text, of which the original makes more than one
        for name, record in records_of(golden_case, version).items():
            key = f"{tokenizer}.{version}.{name}"
            if is_odd(golden_case, key, record, processor.tokenizer):
                continue
            try:
                messages = convert(record, name, MediaPaths(media))["messages"]
            except DataError:
                continue  # we refuse what the original takes
            if rendered(processor, messages) == rendered(processor, as_original(record, media)):
                check_row(golden_case, key, processor, messages)


# ---- a harness that passes on a wrong golden file would be a defect


@moiie_data
@pytest.mark.parametrize("part", SAMPLE_TENSORS)
def test_moiie_a_changed_tensor_fails(
    golden_case: GoldenCase, part: str, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if all("batch" in name or "inference" in name for name in golden_case.names(f"*.{part}")):
        pytest.skip(f"{golden_case.name} has no {part} of single samples")
    broken = GoldenCase(golden_case.path, ledger=None)
    load = broken._load

    def changed(name: str, file: str) -> torch.Tensor:
        tensor = load(name, file)
        return tensor + 1 if name.endswith(part) and "batch" not in name else tensor

    monkeypatch.setattr(broken, "_load", changed)
    with pytest.raises(GoldenMismatchError, match=part):
        check_all_samples(broken, media)
    golden_case.comparisons += 1


# ---- the checks


def check_all_samples(case: GoldenCase, media: Path) -> None:
    for tokenizer, version in settings(case):
        check_samples(case, tokenizer, version, media)


def check_samples(case: GoldenCase, tokenizer: str, version: str, media: Path) -> None:
    single = processor_of(case, tokenizer, version, f"original-{version}", 1)
    expanded = processor_of(case, tokenizer, version, f"original-{version}", image_tokens(case))
    for name, record in records_of(case, version).items():
        key, messages = f"{tokenizer}.{version}.{name}", as_original(record, media)
        expected = prompts_of(case).get(key, {})
        with captured_warnings() as warnings:
            check_row(case, key, single, messages)
        if "prompt" in expected:
            require(f"{key}: prompt", rendered(single, messages), expected["prompt"])
        if "warning" in expected:
            require(f"{key}: warning", counts_in("".join(warnings)), counts_in(expected["warning"]))
        types = expanded.tokenize_conversation(messages)["mm_token_type_ids"]
        case.check_if_present(f"{key}.token_type_ids", torch.tensor(types))


def check_row(case: GoldenCase, key: str, processor: UniMoeProcessor, messages: list[dict[str, Any]]) -> None:
    """Ids and labels of one conversation, one token per image."""
    row = processor.tokenize_conversation(messages)
    check_ids_and_labels(case, key, public(processor, torch.tensor(row["input_ids"])), torch.tensor(row["labels"]))


def check_ids_and_labels(case: GoldenCase, key: str, ids: torch.Tensor, labels: torch.Tensor) -> None:
    case.check_if_present(f"{key}.input_ids", ids)
    if case.has(f"{key}.labels"):
        # An image in an answer is never learned; the original masks it later, when it puts the features in.
        masked_later = case._load(f"{key}.labels", "io") == IMAGE_INDEX
        if masked_later.shape == labels.shape:
            labels = torch.where(masked_later & (labels == -100) & (ids == IMAGE_INDEX), IMAGE_INDEX, labels)
        case.check(f"{key}.labels", labels)


def check_inference(case: GoldenCase, tokenizer: str, version: str, media: Path) -> None:
    key = f"{tokenizer}.{version}.inference"
    prompt = prompts_of(case).get(key, {}).get("prompt")
    if prompt is None:
        return
    question = prompt.partition("USER: ")[2].removesuffix("ASSISTANT:").removesuffix(BUNNY_SEPARATORS[version][0])
    record = {"conversations": [{"from": "human", "value": question}]}
    record |= {"image": ["image.png"] * question.count("<image>")}
    for tokenization in ("plain", f"original-{version}"):
        processor = processor_of(case, tokenizer, version, tokenization, 1)
        messages = convert(record, key, MediaPaths(media))["messages"]
        require(f"{key}: prompt", rendered(processor, messages, add_generation_prompt=True), prompt)
        batch = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        case.check_if_present(f"{key}.input_ids", public(processor, batch["input_ids"][0]))


def check_batch(case: GoldenCase, tokenizer: str, version: str, media: Path) -> None:
    """All samples but the captions, in their order."""
    key, limit = f"{tokenizer}.{version}.batch", case.json("samples")["model_max_length"]
    conversations = [as_original(record, media) for record in records_of(case, version).values()]
    single = processor_of(case, tokenizer, version, f"original-{version}", 1)
    expanded = processor_of(case, tokenizer, version, f"original-{version}", image_tokens(case))
    batch = collated(single, conversations, limit)
    mask, tokenizer = batch["attention_mask"], single.tokenizer
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        # Theirs also leaves out padding tokens that somebody wrote in a text.
        mask = mask * (batch["input_ids"] != single.padding_id)
    case.check_if_present(f"{key}.attention_mask", mask)
    check_ids_and_labels(case, key, public(single, batch["input_ids"]), batch["labels"])
    batch = collated(expanded, conversations, limit)
    # Theirs pads modality ids with the id of the padding token, which means no modality; ours with that of text.
    types = batch["mm_token_type_ids"].masked_fill(batch["attention_mask"] == 0, single.padding_id)
    case.check_if_present(f"{key}.token_type_ids", types)


def collated(processor: UniMoeProcessor, conversations: list[Any], limit: int) -> dict[str, torch.Tensor]:
    """A training batch, cut at the limit as theirs is."""
    try:
        return dict(processor.training_inputs(conversations, max_length=limit))
    except PlaceholderError:  # the limit cuts an image's features, which ours refuses and theirs does
        rows = [processor.tokenize_conversation(messages) for messages in conversations]
        return processor.pad_tokens([{name: row[:limit] for name, row in one.items()} for one in rows])


# ---- cases


def settings(case: GoldenCase) -> list[tuple[str, str]]:
    """(tokenizer, template) of every combination that a case holds."""
    return sorted({tuple(name.split(".")[:2]) for name in case.names()})  # type: ignore[misc]


def prompts_of(case: GoldenCase) -> dict[str, dict[str, str]]:
    return case.json("prompts") if (case.path / "prompts.json").is_file() else {}


def image_tokens(case: GoldenCase) -> int:
    return case.json("samples")["vision_token_num"]


@lru_cache(maxsize=64)
def _processor(folder: Path, tokenizer: str, version: str, tokenization: str, tokens: int) -> UniMoeProcessor:
    data = GoldenCase(folder, ledger=None).json("samples")
    special = {f"{name}_token": token for name, token in data["tokenizers"][tokenizer].items()}
    made = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / f"tokenizer_{tokenizer}.json"),
        model_max_length=data["model_max_length"],
        **special,
    )
    prepare_tokenizer(made, chat_tokens=False)
    template = bunny_chat_template(version, made)
    return tiny_media.processor(
        "image", tokenizer=made, chat_template=template, image_tokens=tokens, tokenization=tokenization
    )


def processor_of(case: GoldenCase, tokenizer: str, version: str, tokenization: str, tokens: int) -> UniMoeProcessor:
    return _processor(case.path, tokenizer, version, tokenization, tokens)


def records_of(case: GoldenCase, version: str) -> dict[str, dict[str, Any]]:
    """The samples that a template is for, as records of a data file."""
    data = case.json("samples")
    if version == "plain":
        given = {
            one["name"]: [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": one["caption"]}]
            for one in data.get("plain", [])
        }
        return {name: {"id": name, "conversations": turns, "image": "image.png"} for name, turns in given.items()}
    records = {}
    for sample in data["samples"]:
        text = "".join(turn["value"] for turn in sample["conversations"])
        own = {"image": ["image.png"] * max(1, text.count("<image>"))} if sample["has_image"] else {}
        records[sample["name"]] = {
            "id": sample["name"],
            "conversations": copy.deepcopy(sample["conversations"]),
            **own,
        }
    return records


def as_original(record: dict[str, Any], media: Path) -> list[dict[str, Any]]:
    return convert(record, record["id"], MediaPaths(media), original_rules="bunny")["messages"]


def is_odd(case: GoldenCase, key: str, record: dict[str, Any], tokenizer: Any) -> bool:
    """Whether the original gave a sample up or cut it, or takes a text in it for a mark of its own, or the other way."""
    if not case.has(f"{key}.input_ids", f"{key}.labels"):
        return True  # nobody knows
    if prompts_of(case).get(key, {}).get("warning"):
        return True
    is_cut = len(case._load(f"{key}.input_ids", "io")) >= case.json("samples")["model_max_length"]
    marks = {"ASSISTANT:", *tokenizer.get_added_vocab()} - ({"<image>"} if "image" in record else set())
    texts = [turn["value"] for turn in record["conversations"]]
    return ("image" not in record and is_cut) or any(mark in text for mark in marks for text in texts)


def rendered(processor: UniMoeProcessor, messages: list[dict[str, Any]], **options: Any) -> str:
    prompt = processor.apply_chat_template(messages, **options)
    return prompt.removeprefix(processor.tokenizer.bos_token or "")


def public(processor: UniMoeProcessor, ids: torch.Tensor) -> torch.Tensor:
    """Ids with the original's number for an image."""
    return ids.masked_fill(ids == processor.image_token_id, IMAGE_INDEX)
