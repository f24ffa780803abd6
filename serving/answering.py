"""A model that answers conversations: generates, and notes which experts were used.

Shape suffixes as in `trainers/telemetry/routing_statistics.py`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TextStreamer

from ..conversion.checkpoints.expert_names import expert_names, numbered
from ..conversion.checkpoints.router_load import RouterLoad
from ..hub_access import MODEL_FILES
from ..model_folder import resolve_folder
from ..model_opener import open_model
from ..modeling_unimoe.configuration_unimoe_text import MODALITIES
from ..processing.sound_tracks_unimoe import with_sound_tracks
from ..trainers.telemetry.routing_figures import ExpertLoad
from ..trainers.telemetry.routing_statistics import RoutingCounts, RoutingRecorder
from .media_needs import MediaPlanner, Needs


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
        expert_names: what a reply's load calls the experts; None: their numbers.
    """

    def __init__(
        self, model: Any, processor: Any, options: dict[str, Any], expert_names: list[str] | None = None
    ) -> None:
        self.model, self.processor, self.options = model, processor, options
        self._expert_names = expert_names or numbered(model.config.text_config.num_experts, [])
        self._planner = MediaPlanner(processor, model)

    def needs(self, messages: list[dict[str, Any]]) -> Needs:
        """What the answer to a conversation will take; raises as `MediaPlanner.needs` does."""
        return self._planner.needs(self._heard(messages), self.options.get("max_new_tokens") or 0)

    def _heard(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the sound tracks of videos, as far as they have some and the model hears, unless an item says no."""
        if getattr(self.processor, "feature_extractor", None) is None:
            return messages
        return with_sound_tracks(messages, self.processor.media_policy)

    def __call__(self, messages: list[dict[str, Any]], show: Callable[[str], None], **options: Any) -> Reply:
        """The answer to a conversation; its text is handed to `show` piece by piece while it appears.

        `options` are further ones of `generate`, for this answer.

        Raises:
            RequestError, UniMoeError: the conversation is longer than the model or the memory has room for.
        """
        started = time.perf_counter()
        self.needs(messages).require_room()
        inputs = self.processor.apply_chat_template(
            self._heard(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        with RoutingRecorder(self.model) as recorder:
            output = self.model.generate(
                **inputs, **self.options, **options, streamer=_Pieces(self.processor.tokenizer, show)
            )
        length = inputs["input_ids"].shape[1]
        return Reply(
            self.processor.tokenizer.decode(output[0, length:], skip_special_tokens=True),
            length,
            output.shape[1] - length,
            time.perf_counter() - started,
            _router_load(self.model.config.text_config, recorder.counts.read(), self._expert_names),
        )


class _Pieces(TextStreamer):
    """Hands finished words to `show`."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def _router_load(config: Any, counts: RoutingCounts, names: list[str]) -> RouterLoad | None:
    if not config.sparse_layers:
        return None
    load = ExpertLoad.of(config, counts.tokens_NM[0], counts.chosen_NLMX[0])
    shares_LME = load.shares
    return RouterLoad(
        load.layers,
        names,
        {MODALITIES[modality]: shares_LME[:, modality].tolist() for modality in load.modalities},
    )


def load_answerer(name: str, device: str | None, options: dict[str, Any], quantize: str | None = None) -> Answerer:
    """What `open_model` opens, generating with the given options."""
    processor, model = open_model(name, device, quantize)
    names = expert_names(resolve_folder(name, MODEL_FILES), model.config.text_config)
    return Answerer(model, processor, options, names)
