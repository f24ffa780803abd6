"""Models that answer requests: ours with their processor, and any other causal language model for text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers.utils import logging

from ...errors import CheckpointError, DataError
from .requests import Request

logger = logging.get_logger(__name__)

# What a model without a chat template is given.
_PLAIN_PROMPT = "{question}\nAnswer:"
# Every batch looks at these, so that a letter's tokens do not depend on the options of others.
_USUAL_LETTERS = "ABCDE"


class Answerer(Protocol):
    """Anything that answers a batch of requests greedily."""

    kinds: frozenset[str]  # of media that it takes

    def prompts(self, requests: Sequence[Request]) -> list[str]:
        """Exactly what the model will see, as text; media as their placeholders."""

    def prepare(self, requests: Sequence[Request]) -> Any:
        """The model's inputs.

        Raises:
            MediaError, ConversationError: a request of the batch cannot be used.
        """

    def generate(self, inputs: Any, max_new_tokens: int) -> list[str]:
        """The answers, in order."""

    def likeliest_letters(self, inputs: Any, letters: Sequence[str]) -> list[str]:
        """Of each request the letter, among its own, that the model would most likely begin its answer with."""


class ChatAnswerer:
    """A model of ours and its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor
        config = model.config
        kinds = {
            "image": config.image_connector,
            "video": config.video_connector or config.image_connector,
            "audio": config.speech_connector or config.sound_connector,
        }
        self.kinds = frozenset(kind for kind, connector in kinds.items() if connector is not None)

    def prompts(self, requests: Sequence[Request]) -> list[str]:
        conversations = [request.messages for request in requests]
        return self.processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)

    def prepare(self, requests: Sequence[Request]) -> Any:
        return self.processor.apply_chat_template(
            [request.messages for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def generate(self, inputs: Any, max_new_tokens: int) -> list[str]:
        return _generate(self.model, self.processor.tokenizer, inputs.to(self.model.device), max_new_tokens)

    def likeliest_letters(self, inputs: Any, letters: Sequence[str]) -> list[str]:
        return _likeliest_letters(self.model, self.processor.tokenizer, inputs.to(self.model.device), letters)


class TextAnswerer:
    """Any causal language model; text only."""

    kinds: frozenset[str] = frozenset()

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def prompts(self, requests: Sequence[Request]) -> list[str]:
        if not self.tokenizer.chat_template:
            return [_PLAIN_PROMPT.format_map({"question": request.text}) for request in requests]
        conversations = [[{"role": "user", "content": request.text}] for request in requests]
        return self.tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)

    def prepare(self, requests: Sequence[Request]) -> Any:
        # A chat template has written the special tokens already.
        special = not self.tokenizer.chat_template
        inputs = self.tokenizer(self.prompts(requests), padding=True, add_special_tokens=special, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        return inputs

    def generate(self, inputs: Any, max_new_tokens: int) -> list[str]:
        return _generate(self.model, self.tokenizer, inputs.to(self.model.device), max_new_tokens)

    def likeliest_letters(self, inputs: Any, letters: Sequence[str]) -> list[str]:
        return _likeliest_letters(self.model, self.tokenizer, inputs.to(self.model.device), letters)


def _generate(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    import torch

    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": _padding_id(tokenizer)}
    with torch.no_grad():
        output = model.generate(**inputs, **options)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _likeliest_letters(model: Any, tokenizer: Any, inputs: Any, letters: Sequence[str]) -> list[str]:
    import torch

    tokens = _letter_tokens(tokenizer, sorted({*_USUAL_LETTERS, *"".join(letters)}))
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": _padding_id(tokenizer)}
    with torch.no_grad():
        output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    logits = output.logits[0].float().cpu()  # all at once, and not letter by letter
    return [
        max(own, key=lambda letter, row=row: float(row[tokens[letter]].max()))
        for row, own in zip(logits, letters, strict=True)
    ]


def _padding_id(tokenizer: Any) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _letter_tokens(tokenizer: Any, letters: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of each letter, alone and behind a space: of these forms those that are one token for every letter."""
    tokens: dict[str, list[int]] = {letter: [] for letter in letters}
    for form in ("{}", " {}"):
        ids = [tokenizer.encode(form.format(letter), add_special_tokens=False) for letter in letters]
        if all(len(one) == 1 for one in ids):
            for letter, one in zip(letters, ids, strict=True):
                tokens[letter] += one
    if not all(tokens.values()):
        raise CheckpointError("The tokenizer has no single tokens for letters: leave out --likeliest-letter.")
    return tokens


def open_answerer(name: str, device: Any, quantize: str | None = None) -> Answerer:
    """A model folder or Hub id, ours or any that AutoModelForCausalLM takes, on a device; see `open_model`.

    For one of ours with mixers, the vision models that its folder names look at the images; see `let_perceive`.
    """
    from ...model_opener import open_model
    from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
    from ...serving.sight import let_perceive

    processor, model = open_model(name, device, quantize, others=True)
    if not isinstance(model.config, UniMoeConfig):
        return TextAnswerer(model, processor)
    if (note := let_perceive(name, model, processor)) is not None:
        logger.warning(note)
    return ChatAnswerer(model, processor)


def require_kinds(answerer: Answerer, task: str, requests: Sequence[Request]) -> None:
    """Raise a DataError if the model lacks a sense that a task needs."""
    needed = {item["type"] for request in requests for item in request.media}
    if lacking := sorted(needed - answerer.kinds):
        raise DataError(f"The model takes no {' and no '.join(lacking)}, which {task} is about: leave the task out.")


def fingerprint(name: str) -> str:
    """What tells one model folder from another without reading its weights: names and sizes of its files."""
    import hashlib

    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    files = sorted(f"{file.name} {file.stat().st_size}" for file in folder.iterdir() if file.is_file())
    config = folder / "config.json"
    text = "\n".join(files) + (config.read_text(encoding="utf-8") if config.is_file() else "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
