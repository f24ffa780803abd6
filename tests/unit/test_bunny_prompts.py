"""Bunny's templates and label masks, which MoIIE uses: right by default, the original's by name."""

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_media
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from unimoe.errors import PlaceholderError, UniMoeError
from unimoe.processing.chat_templates_unimoe import BUNNY_SEPARATORS, BUNNY_VERSIONS, bunny_chat_template
from unimoe.processing.processing_unimoe import UniMoeProcessor, prepare_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
IMAGE = {"type": "image"}


def tokenizer(begins: bool = False, pad: str | None = "<unk>", limit: int = 1000) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows every token that ends an answer, with or without a BOS of its own."""
    made = tiny_media.tokenizer()
    made.add_tokens(list(ENDS), special_tokens=True)
    made.pad_token, made.model_max_length = pad, limit
    made.padding_side = "right"
    if begins:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
        )
    return made


def processor(version: str, tokenization: str = "plain", **settings: Any) -> UniMoeProcessor:
    made = tokenizer(**settings)
    if version in BUNNY_SEPARATORS:
        made.eos_token = BUNNY_SEPARATORS[version][1]
        if settings.get("pad") == "eos":
            made.pad_token = made.eos_token
    template = bunny_chat_template(version, made)
    return tiny_media.processor(
        "image", tokenizer=made, chat_template=template, image_tokens=1, tokenization=tokenization
    )


def conversation(*texts: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def learned(made: UniMoeProcessor, messages: list[dict[str, Any]]) -> str:
    row = made.tokenize_conversation(messages)
    return made.tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("version", sorted(BUNNY_SEPARATORS))
def test_templates(version: str, begins: bool) -> None:
    made = processor(version, begins=begins)
    sep, end = BUNNY_SEPARATORS[version]
    start = "<s>" * begins + SYSTEM + sep
    messages = conversation([IMAGE, {"type": "text", "text": "What?"}], "A cat.", "Sure?", "Yes.")
    first = f"{start}USER: <image>\nWhat?{sep}ASSISTANT: A cat.{end}"
    assert made.apply_chat_template(messages) == f"{first}USER: Sure?{sep}ASSISTANT: Yes.{end}"
    assert made.apply_chat_template(messages[:3], add_generation_prompt=True) == f"{first}USER: Sure?{sep}ASSISTANT:"
    assert made.apply_chat_template([{"role": "system", "content": "Be brief."}, *conversation("Hi", "Ho")]) == (
        f"{'<s>' * begins}Be brief.{sep}USER: Hi{sep}ASSISTANT: Ho{end}"
    )
    assert learned(made, messages) == f" A cat.{end} Yes.{end}"


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("tokenization", ["plain", "original-plain"])
def test_the_template_for_captions(tokenization: str, begins: bool) -> None:
    made = processor("plain", tokenization, begins=begins)
    messages = conversation([IMAGE, {"type": "text", "text": "\nDescribe it."}], "A red car.")
    assert made.apply_chat_template(messages) == "<s>" * begins + "<image>A red car.\n"
    assert learned(made, messages) == "A red car.\n"
    assert learned(made, conversation([IMAGE, IMAGE], "Two <image> cars.")) == "Two <image> cars.\n"


def test_an_unknown_version_is_named() -> None:
    with pytest.raises(UniMoeError, match=r"no template 'llama3'.*'minicpm'"):
        bunny_chat_template("llama3", tokenizer())


# ---- the original's rules, written down once more as the counting of the specification


def original_labels(made: UniMoeProcessor, version: str, prompt: str) -> tuple[list[int], list[int], bool]:
    """Ids, labels and whether the counts failed, of a prompt without media."""
    tokenizer, limit = made.tokenizer, made.tokenizer.model_max_length
    sep, end = BUNNY_SEPARATORS[version]
    with_bos = version != "bunny" and (version != "phi3" or tokenizer("")["input_ids"] != [])
    ids = tokenizer(prompt)["input_ids"][:limit]
    total = sum(token != tokenizer.pad_token_id for token in ids)
    position, rounds = int(with_bos), 0
    masked = set(range(position))
    for text in prompt.split(end):
        parts = text.split(f"{sep}ASSISTANT: ")
        if text == "" or len(parts) != 2:
            break
        before = len(tokenizer(f"{parts[0]}{sep}ASSISTANT: ")["input_ids"]) - (2 if with_bos else 1)
        masked |= set(range(position, position + before))
        position += len(tokenizer(text)["input_ids"]) + (not with_bos)
        rounds += 1
    masked |= set(range(position, len(ids)))
    position -= rounds * (tokenizer.pad_token_id == tokenizer.eos_token_id)
    failed = position < limit and position != total
    return ids, [-100 if failed or i in masked else token for i, token in enumerate(ids)], failed


CONVERSATIONS = {
    "one round": conversation("Hi", "Ho"),
    "three rounds": conversation("Hi", "Ho", "What is it?", "A cat and a dog.", "Bye", "Bye"),
    "an end inside": conversation("Say </s> or <|endoftext|> or <|end_of_text|>", "No."),
    "a mark inside": conversation("Who says ASSISTANT: here?", "I. ASSISTANT: you."),
    "an end in an answer": conversation("Hi", "One.</s>Two.<|endoftext|>Three.<|end_of_text|>", "More", "Four."),
    "padding inside": conversation("Write <unk> here", "<unk>"),
    "an open answer": conversation("Hi", "Ho", "And?", ""),
    "long": conversation("Hi " * 60, "Ho " * 60),
    "empty of learning": conversation("Hi " * 300, "Ho"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("version", sorted(BUNNY_SEPARATORS))
@pytest.mark.parametrize(
    ("begins", "pad", "limit"),
    [(False, "<unk>", 1000), (True, "<unk>", 1000), (True, "eos", 1000), (False, "eos", 150), (True, "<unk>", 150)],
)
def test_the_originals_counting(
    version: str, name: str, begins: bool, pad: str, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    made = processor(version, f"original-{version}", begins=begins, pad=pad, limit=limit)
    messages = CONVERSATIONS[name]
    prompt = made.apply_chat_template(messages).removeprefix("<s>" * begins)
    ids, labels, failed = original_labels(made, version, prompt)
    logger = logging.getLogger("unimoe.processing.original_chat_unimoe")
    logger.addHandler(caplog.handler)
    row = made.tokenize_conversation(messages)
    logger.removeHandler(caplog.handler)
    assert row["input_ids"] == ids
    assert row["labels"] == labels
    assert ("mismatch" in caplog.text) == failed
    if name in ("one round", "three rounds") and begins == (version != "bunny") and limit == 1000:
        assert not failed
        default = processor(version, begins=begins, pad=pad).tokenize_conversation(messages)
        assert (default["input_ids"], default["labels"]) == (ids, labels)


@pytest.mark.parametrize("version", sorted(BUNNY_VERSIONS))
def test_texts_cannot_claim_images(version: str) -> None:
    texts = conversation("Is <image> or <video> a token?", "<image> is not.")
    for tokenization in ("plain", f"original-{version}"):
        made = processor(version, tokenization, begins=True)
        row = made.tokenize_conversation(texts)
        assert made.image_token_id not in row["input_ids"]
        assert not any(row["mm_token_type_ids"])
        assert "<image> is not." in made.tokenizer.decode(row["input_ids"])


def test_a_media_token_that_merges_made_becomes_one() -> None:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(["<image> <image> s<image>"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    before = made.convert_tokens_to_ids("<image>")
    assert before != made.unk_token_id
    assert before not in made.encode("s<image>")
    prepare_tokenizer(made, chat_tokens=False)
    assert made.encode("s<image>").count(before) == 1


def test_a_batch_without_images_may_hold_samples_that_are_given_up() -> None:
    made = processor("phi3", "original-phi3", pad="eos")
    batch = made.training_inputs([conversation("Hi", "Ho"), conversation("Say <|endoftext|> now", "No")])
    learned_tokens = (batch["labels"] != -100).sum(dim=1).tolist()
    assert learned_tokens[0] > 0
    assert learned_tokens[1] == 0
    # The token that ends an answer is also the padding; a mask by its id would lose it.
    assert batch["attention_mask"].sum(dim=1).tolist() == [
        len(made.tokenize_conversation(messages)["input_ids"])
        for messages in (conversation("Hi", "Ho"), conversation("Say <|endoftext|> now", "No"))
    ]


def test_the_rules_are_saved(tmp_path: Path) -> None:
    processor("llama", "original-llama", begins=True).save_pretrained(tmp_path)
    loaded = UniMoeProcessor.from_pretrained(tmp_path)
    assert loaded.tokenization == "original-llama"
    assert loaded.apply_chat_template(conversation("Hi", "Ho")).endswith("USER: HiASSISTANT: Ho<|end_of_text|>")
    with pytest.raises(PlaceholderError, match="tokenization is 'original-odd'"):
        processor("llama", "original-odd")
