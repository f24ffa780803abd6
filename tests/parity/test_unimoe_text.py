"""Uni-MoE's prompts, token ids, labels and orders of samples against golden data.

A folder with a `cases.json` of Uni-MoE's conversations or groupings, made by the original code, and its tokenizer. Every
field of every case is an input or is compared; a field or a kind of case that this file does not know is a failure.
"""

import copy
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import tiny_media
import torch
from golden import CASES_FILE, GoldenMismatchError, golden_root, leave_for_lack_of_data, record_case
from prompt_checks import captured_warnings, counts_in, require
from transformers import AutoTokenizer

from unimoe.errors import DataError
from unimoe.processing.processing_unimoe import VICUNA_CHAT_TEMPLATE, UniMoeProcessor, prepare_tokenizer
from unimoe.trainers.data.media_paths import MediaPaths
from unimoe.trainers.data.original_data import convert
from unimoe.trainers.data.original_sampler import original_order
from unimoe.trainers.data.sampler import ModalityBatchSampler

PLACEHOLDERS = {"<image>": -200, "<audio>": -300, "<video>": -400}
KEYS = {"<image>": "image", "<audio>": "voice", "<video>": "video"}
CASE_INPUTS = {"name", "modalities", "conversations"}
CASE_RESULTS = {
    "prompt",
    "input_ids",
    "labels",
    "warning",
    "generation_prompt",
    "generation_input_ids",
    "error",
}
GROUPING_INPUTS = {"lengths", "types", "batch_size", "world_size", "seed"}
GROUPING_RULES = {
    "length_grouped": "length",
    "modality_type_grouped_dp": "modality_type",
    "modality_sign_grouped_speech_audio": "modality_sign",
}


def text_folders() -> list[Path]:
    root = golden_root()
    files = root.rglob(CASES_FILE) if root.is_dir() else []
    return sorted(file.parent for file in files if is_ours(json.loads(file.read_text(encoding="utf-8"))))


def is_ours(data: Any) -> bool:
    """Whether it is of Uni-MoE, by what it holds: other systems have a `cases.json` of another form."""
    if not isinstance(data, dict):
        return False
    needed = {"cases": {"conversations", "modalities"}, "grouping": {"lengths", "types"}}
    first = {kind: next(iter(data.get(kind) or []), None) for kind in needed}
    return any(isinstance(entry, dict) and needed[kind] <= set(entry) for kind, entry in first.items())


def entries(kind: str) -> list[Any]:
    """(folder, index, entry) of every entry of a kind, as pytest's parameters."""
    found = []
    for folder in text_folders():
        for index, entry in enumerate(json.loads((folder / CASES_FILE).read_text(encoding="utf-8")).get(kind, [])):
            name = f"{folder.name}-{kind}-{index}-{entry.get('name', entry.get('seed'))}"
            found.append(pytest.param((folder, index, entry), id=name))
    return found or [pytest.param(None, id="no-golden-data")]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny picture, which also is a video's frame, and a tiny sound."""
    folder = tmp_path_factory.mktemp("media")
    PIL.Image.new("RGB", (8, 8)).save(folder / "image.png")
    (folder / "voice.wav").write_bytes(tiny_media.wav(tiny_media.sound(0.1)))
    return folder


@pytest.mark.parametrize("given", entries("cases"))
def test_prompts_tokens_and_labels_are_the_originals(given: Any, media: Path) -> None:
    folder, index, case = given or leave_for_lack_of_data()
    compared = check_case(folder, case, media)
    record_case(folder / CASES_FILE, "cases", index, compared=compared, read=CASE_INPUTS)


@pytest.mark.parametrize("given", entries("cases"))
def test_default_rules_agree_where_the_original_is_right(given: Any, media: Path) -> None:
    folder, _, case = given or leave_for_lack_of_data()
    if case.get("error") or case.get("warning"):
        pytest.skip(f"{case['name']}: the original gave this sample up")
    if any(mark in turn["value"] for turn in case["conversations"] for mark in ("<s>", "</s>", "<unk>", "ASSISTANT:")):
        pytest.skip(f"{case['name']}: a text holds what the original takes for its own marks")
    try:
        messages = convert(record_of(case), case["name"], MediaPaths(media))["messages"]
    except DataError as error:
        pytest.skip(f"we refuse what the original takes: {error}")
    if messages != convert(record_of(case), case["name"], MediaPaths(media), original_rules="unimoe")["messages"]:
        pytest.skip(f"{case['name']}: the original reads this sample wrongly")
    processor = processor_of(folder, "spaced")
    check_training(processor, case, messages)
    check_generation(processor, case, messages)


@pytest.mark.parametrize("given", entries("grouping"))
def test_orders_of_samples_are_the_originals(given: Any) -> None:
    folder, index, grouping = given or leave_for_lack_of_data()
    compared = check_grouping(grouping)
    record_case(folder / CASES_FILE, "grouping", index, compared=compared, read=GROUPING_INPUTS)


@pytest.mark.parametrize("given", entries("grouping"))
def test_our_own_sampler_never_mixes_types_in_a_megabatch(given: Any) -> None:
    _, _, grouping = given or leave_for_lack_of_data()
    types, per_step = grouping["types"], grouping["world_size"]
    groups = {str(kind): [i for i, own in enumerate(types) if own == kind] for kind in sorted(set(types))}
    sampler = ModalityBatchSampler(groups, grouping["batch_size"], seed=grouping["seed"], batches_per_step=per_step)
    batches = list(sampler)
    seen = set()
    for start in range(0, len(batches), per_step):
        kinds = {types[draw.index] for batch in batches[start : start + per_step] for draw in batch}
        assert len(kinds) == 1, f"megabatch {start // per_step} mixes the types {kinds}"
        seen |= kinds
    assert len(seen) == min(len(set(types)), len(batches) // per_step)


@pytest.mark.parametrize("folder", text_folders() or [None], ids=lambda folder: getattr(folder, "name", "none"))
def test_no_kind_of_case_is_unknown(folder: Path | None) -> None:
    kinds = json.loads(((folder or leave_for_lack_of_data()) / CASES_FILE).read_text(encoding="utf-8"))
    check_kinds(folder.name, kinds)


# ---- a harness that passes on a corrupted golden file would be a defect


def flip(value: Any) -> Any:
    """A value of the same type that differs in one place."""
    if isinstance(value, list):
        return [*value[:-1], value[-1] + 1]
    if " vs. " in value:  # of a warning only the two counts are compared
        return value.replace(" vs. ", "0 vs. ")
    return "WARNING: tokenization mismatch: 7 vs. 8. (ignored)" if not value else value[:-1] + "#"


def entry_with(kind: str, field: str) -> tuple[Path, Any]:
    """A folder, and a fresh copy of an entry of it that holds the field and on which the original did not fail."""
    for folder in text_folders():
        for entry in json.loads((folder / CASES_FILE).read_text(encoding="utf-8")).get(kind, []):
            if field in entry and not entry.get("error"):
                return folder, entry
    leave_for_lack_of_data()


@pytest.mark.parametrize("field", sorted(CASE_RESULTS - {"error"}))
def test_a_flipped_value_of_a_case_fails(field: str, media: Path) -> None:
    folder, case = entry_with("cases", field)
    changed = {**case, field: flip(case[field])}
    with pytest.raises(GoldenMismatchError, match=re.escape(f"{case['name']}: {field}")):
        check_case(folder, changed, media)


def test_an_error_that_we_do_not_raise_fails(media: Path) -> None:
    folder, case = entry_with("cases", "conversations")
    failed = {name: case[name] for name in CASE_INPUTS} | {"error": "AssertionError: 0"}
    with pytest.raises(GoldenMismatchError, match="the original raised"):
        check_case(folder, failed, media)


@pytest.mark.parametrize("field", sorted(GROUPING_RULES))
def test_a_flipped_index_of_an_order_fails(field: str) -> None:
    _, grouping = entry_with("grouping", field)
    with pytest.raises(GoldenMismatchError, match=field):
        check_grouping({**grouping, field: flip(grouping[field])})


def test_unknown_fields_of_a_case_fail_by_name(media: Path) -> None:
    folder, case = entry_with("cases", "conversations")
    with pytest.raises(GoldenMismatchError, match="positions"):
        check_case(folder, {**case, "positions": [1]}, media)


def test_unknown_fields_of_a_grouping_fail_by_name() -> None:
    _, grouping = entry_with("grouping", "lengths")
    with pytest.raises(GoldenMismatchError, match="packing"):
        check_grouping({**grouping, "packing": []})


def test_unknown_kinds_of_cases_fail_by_name() -> None:
    with pytest.raises(GoldenMismatchError, match="styles"):
        check_kinds("unimoe-text", {"cases": [], "styles": []})


# ---- the checks


def check_kinds(name: str, data: dict[str, Any]) -> None:
    require(f"{name}: kinds of cases", sorted(set(data) - {"cases", "grouping"}), [])


def check_case(folder: Path, case: dict[str, Any], media: Path) -> set[str]:
    """Compare everything that the original made of a case with what we make by its rules; returns the fields compared."""
    name = case["name"]
    require(f"{name}: unknown fields", sorted(set(case) - CASE_INPUTS - CASE_RESULTS), [])
    require(f"{name}: unknown modalities", sorted(set(case["modalities"]) - set(KEYS.values())), [])
    if case.get("error"):
        require(
            f"{name}: results beside an error", sorted(key for key in CASE_RESULTS - {"error"} if case.get(key)), []
        )
        try:
            convert(record_of(case), name, MediaPaths(media), original_rules="unimoe")
        except DataError:
            return CASE_RESULTS
        raise GoldenMismatchError(f"{name}: the original raised {case['error']!r}, ours does not")
    messages = convert(record_of(case), name, MediaPaths(media), original_rules="unimoe")["messages"]
    processor = processor_of(folder, "original")
    with captured_warnings() as warnings:
        check_training(processor, case, messages)
    if "warning" in case:
        require(f"{name}: warning", counts_in("".join(warnings)), counts_in(case["warning"]))
    opened = check_generation(processor, case, messages)
    return {"prompt", "input_ids", "labels", "warning", *opened, *({"error"} if "error" in case else ())}


def check_training(processor: UniMoeProcessor, case: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    bos = processor.tokenizer.bos_token
    if "prompt" in case:
        prompt = processor.apply_chat_template(messages)
        require(f"{case['name']}: prompt", prompt.removeprefix(bos), case["prompt"])
    if all_there(messages):
        batch = processor.training_inputs([messages])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        for key, token in (("pixel_values", -200), ("pixel_values_videos", -400), ("speech_features", -300)):
            require(f"{case['name']}: {key}", len(batch.get(key, [])), public(processor, ids).count(token))
    else:
        tokens = processor.tokenize_conversation(messages)
        ids, labels = tokens["input_ids"], tokens["labels"]
    if "input_ids" in case:
        require(f"{case['name']}: input_ids", public(processor, ids), case["input_ids"])
    if "labels" in case:
        # A placeholder in an answer is never learned; the original masks it later, when it puts the features in.
        expected = [-100 if label in PLACEHOLDERS.values() else label for label in case["labels"]]
        require(f"{case['name']}: labels", labels, expected)


def check_generation(processor: UniMoeProcessor, case: dict[str, Any], messages: list[dict[str, Any]]) -> set[str]:
    """The last turn emptied: an open answer. Returns the fields compared; ids need all of the media."""
    if messages[-1]["role"] == "assistant":
        question, options = messages[:-1], {"add_generation_prompt": True}
    else:
        question, options = [*messages[:-1], {**messages[-1], "content": ""}], {}
    if "generation_prompt" in case:
        prompt = processor.apply_chat_template(question, **options).removeprefix(processor.tokenizer.bos_token)
        require(f"{case['name']}: generation_prompt", prompt, case["generation_prompt"])
    if "generation_input_ids" in case and all_there(question):
        batch = processor.apply_chat_template(question, tokenize=True, return_dict=True, **options)
        ids = public(processor, batch["input_ids"][0])
        require(f"{case['name']}: generation_input_ids", ids, case["generation_input_ids"])
        return {"generation_prompt", "generation_input_ids"}
    return {"generation_prompt"}


def check_grouping(grouping: dict[str, Any]) -> set[str]:
    """Compare the original's orders index for index, and what they promise about megabatches; returns their fields."""
    require(
        f"unknown fields of seed {grouping['seed']}", sorted(set(grouping) - GROUPING_INPUTS - set(GROUPING_RULES)), []
    )
    types = grouping["types"]
    size = grouping["batch_size"] * grouping["world_size"]
    for field, rule in GROUPING_RULES.items():
        if field not in grouping:
            continue
        torch.manual_seed(grouping["seed"])
        order = original_order(rule, grouping["lengths"], types, grouping["batch_size"], grouping["world_size"])
        require(field, order, grouping[field])
        require(f"{field}: every index once", sorted(set(order)), sorted(order))
        if rule == "modality_type":
            require(f"{field}: whole megabatches", len(order) % size, 0)
            mixed = [i for i in range(0, len(order), size) if len({types[index] for index in order[i : i + size]}) > 1]
            require(f"{field}: megabatches of several types", mixed, [])
    return set(GROUPING_RULES) & set(grouping)


def record_of(case: dict[str, Any]) -> dict[str, Any]:
    """The sample of a case, with as many media of each of its modalities as it has placeholders, but one at least."""
    record: dict[str, Any] = {"id": case["name"], "conversations": copy.deepcopy(case["conversations"])}
    text = json.dumps(case["conversations"])
    for placeholder, key in KEYS.items():
        if key in case["modalities"]:
            medium: Any = {"image": "image.png", "voice": "voice.wav", "video": ["image.png", "image.png"]}[key]
            record[key] = [medium] * max(1, text.count(placeholder))
    return record


def all_there(messages: list[dict[str, Any]]) -> bool:
    """Whether every placeholder has a medium: the original's rules let it have none."""
    items = [item for message in messages if isinstance(message["content"], list) for item in message["content"]]
    return all(item["type"] == "text" or item.get("path") or item.get(item["type"]) for item in items)


def public(processor: UniMoeProcessor, ids: list[int]) -> list[int]:
    """Ids with the original's numbers of the placeholders."""
    numbers = {processor.tokenizer.convert_tokens_to_ids(token): number for token, number in PLACEHOLDERS.items()}
    return [numbers.get(token, token) for token in ids]


@lru_cache(maxsize=16)
def processor_of(folder: Path, tokenization: str) -> UniMoeProcessor:
    """A processor with the folder's tokenizer that gives every medium one token."""
    own = folder / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(own if own.is_dir() else folder)
    prepare_tokenizer(tokenizer, chat_tokens=False)
    return tiny_media.processor(
        "image video speech",
        tokenizer=tokenizer,
        chat_template=VICUNA_CHAT_TEMPLATE,
        image_tokens=1,
        video_tokens=1,
        speech_tokens=1,
        tokenization=tokenization,
    )
