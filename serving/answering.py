"""A model that answers conversations: loads it with its processor, generates, and notes which experts were used.

Shape suffixes as in `trainers/telemetry/routing_statistics.py`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoProcessor, TextStreamer

from ..conversion.checkpoints.checkpoint_reader import Checkpoint, read_json
from ..conversion.checkpoints.description import RouterLoad
from ..conversion.dense.sources import read_our_config, resolve_folder
from ..errors import CheckpointError, UniMoeError
from ..hub_access import MODEL_FILES
from ..modeling_unimoe.configuration_unimoe_text import MODALITIES
from ..processing.sound_tracks_unimoe import with_sound_tracks
from ..progress_bars import transformers_bars
from ..trainers.telemetry.routing_figures import ExpertLoad
from ..trainers.telemetry.routing_statistics import RoutingCounts, RoutingRecorder
from .media_needs import MediaPlanner, Needs

# JSON files that must be objects where they exist.
_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Args:
        prompt_tokens, new_tokens: media included.
        load: which share of each modality's tokens went to every expert, of prompt and answer; None for dense models.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    load: RouterLoad | None


class Answerer:
    """Answers conversations.

    Args:
        options: of `generate`.
    """

    def __init__(self, model: Any, processor: Any, options: dict[str, Any]) -> None:
        self.model, self.processor, self.options = model, processor, options
        self._planner = MediaPlanner(processor, model)

    def needs(self, messages: list[dict[str, Any]]) -> Needs:
        """What the answer to a conversation will take; raises as `MediaPlanner.needs` does."""
        return self._planner.needs(self._heard(messages), self.options.get("max_new_tokens") or 0)

    def _heard(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the sound tracks of videos, as far as they have some and the model hears, unless an item says no."""
        if getattr(self.processor, "feature_extractor", None) is None:
            return messages
        return with_sound_tracks(messages, self.processor.media_policy)

    def __call__(self, messages: list[dict[str, Any]], show: Callable[[str], None]) -> Reply:
        """The answer to a conversation; its text is handed to `show` piece by piece while it appears.

        Raises:
            RequestError, UniMoeError: the conversation is longer than the model or the memory has room for.
        """
        started = time.perf_counter()
        self.needs(messages).require_room()
        inputs = self.processor.apply_chat_template(
            self._heard(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        with RoutingRecorder(self.model) as recorder:
            output = self.model.generate(**inputs, **self.options, streamer=_Pieces(self.processor.tokenizer, show))
        length = inputs["input_ids"].shape[1]
        return Reply(
            self.processor.tokenizer.decode(output[0, length:], skip_special_tokens=True),
            length,
            output.shape[1] - length,
            time.perf_counter() - started,
            _router_load(self.model.config.text_config, recorder.counts.read()),
        )


class _Pieces(TextStreamer):
    """Hands finished words to `show`."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def _router_load(config: Any, counts: RoutingCounts) -> RouterLoad | None:
    if not config.sparse_layers:
        return None
    load = ExpertLoad.of(config, counts.tokens_NM[0], counts.chosen_NLMX[0])
    shares_LME = load.shares
    return RouterLoad(
        load.layers,
        [str(expert) for expert in range(config.num_experts)],
        {MODALITIES[modality]: shares_LME[:, modality].tolist() for modality in load.modalities},
    )


def load_answerer(name: str, device: str | None, options: dict[str, Any]) -> Answerer:
    """What `open_model` opens, generating with the given options."""
    processor, model = open_model(name, device)
    return Answerer(model, processor, options)


def open_model(name: str, device: str | None = None) -> tuple[Any, Any]:
    """The processor and the model of a folder or Hub id.

    Args:
        device: cuda where there is one, else cpu, for None.

    Raises:
        ConversionError: there is no such folder or Hub repository, it holds another kind of model, or a file of it is
            missing or damaged.
        CheckpointError: its tokenizer is missing, or its files do not go together.
        UniMoeError: the device is not there.
    """
    place = _usable_device(device)
    with transformers_bars(shown=False):
        folder = resolve_folder(name, MODEL_FILES)
        _check_files(folder)
        return _load(folder, place)


def _usable_device(name: str | None) -> torch.device:
    """The device of that name once it has computed something; cuda or cpu for None."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add(1).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:  # which one depends on the kind of device
        reason = str(error).partition("\n")[0]
        raise UniMoeError(
            f"--device is {name!r}, which cannot be used here ({reason}): use cpu, or leave the option out."
        ) from error
    return device


def _check_files(folder: Path) -> None:
    """What transformers would answer with a traceback: files that are missing, truncated or not what they should be."""
    read_our_config(folder)
    Checkpoint(folder)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no {_TOKENIZER_FILES[0]}: if it was converted, convert again with the tokenizer's files beside "
            "the original config.json; else save the processor into it (processor.save_pretrained)."
        )
    contents = {file: read_json(folder / file) for file in _JSON_FILES if (folder / file).is_file()}
    if not isinstance(contents.get("tokenizer.json", {"model": {}}).get("model"), dict):
        raise CheckpointError(f"{folder / 'tokenizer.json'} has no model of a tokenizer in it: fetch the file again.")


def _load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Processor and model. What transformers raises here means that the files do not go together, or do not fit in."""
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"The processor in {folder} cannot be loaded ({error}): save it again, with its tokenizer."
        ) from error
    try:
        return processor, AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The model in {folder} cannot be loaded on {device}: {error}") from error
