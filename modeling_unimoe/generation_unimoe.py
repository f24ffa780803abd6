"""Generation: media go in with the prompt, once; what is generated is text."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import Cache, GenerationMixin
from transformers.utils import logging

from .auxiliary_unimoe import AUX_INPUTS, continued_prompt, prompt_to_continue
from .configuration_unimoe import UniMoeConfig
from .configuration_unimoe_text import MODALITIES, UniMoeTextConfig
from .encoding_unimoe import MEDIA_INPUTS
from .errors_unimoe import ModalityError

logger = logging.get_logger(__name__)


class UniMoeGenerationMixin(GenerationMixin):
    """`generate` of a model that takes media: how they enter with a prompt, and are repeated for several answers."""

    config: UniMoeConfig
    model: Any
    _has_warned_of_length = False

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Media and their types go in once, with the prompt; every generated token is text."""
        is_prompt = is_first_iteration
        self._warn_of_long_context(input_ids, kwargs.get("inputs_embeds") if is_first_iteration else None)
        if restarts_at_longer_rope(self.config.text_config, input_ids.shape[1], kwargs.get("past_key_values")):
            kwargs |= {"past_key_values": None, "next_sequence_length": None}
            is_first_iteration = True
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_prompt:
            inputs.pop("mm_token_type_ids", None)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*(name for names in MEDIA_INPUTS.values() for name in names), *AUX_INPUTS):
                inputs.pop(name, None)
        elif inputs.get("prompt_mask") is not None:
            tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            cache = kwargs.get("past_key_values")
            cached = 0 if cache is None else int(cache.get_seq_length())
            inputs["prompt_mask"] = continued_prompt(inputs["prompt_mask"], tokens.shape[1], cached)
        return inputs

    def _warn_of_long_context(self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None) -> None:
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        limit = self.config.text_config.max_position_embeddings
        if length > limit and not self._has_warned_of_length:
            self._has_warned_of_length = True
            logger.warning(
                f"The context has {length} tokens, more than the {limit} of max_position_embeddings that this model was "
                "made for: its answers will suffer. Give a shorter conversation or fewer media, or generate less."
            )

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching, of texts; raises ModalityError where one has placeholders of media."""
        require_texts(inputs, self.config)
        return super().generate_batch(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Repeat every sample's media together: repeating row by row would interleave a sample's images.

        What is generated is no part of the prompt, which the mask says that is added here.
        """
        if input_ids is not None and any(model_kwargs.get(name) is not None for name in AUX_INPUTS):
            masks = (model_kwargs.get("prompt_mask"), input_ids, model_kwargs.get("attention_mask"))
            model_kwargs["prompt_mask"] = prompt_to_continue(*masks)
        apart = ("expert_choice", *(name for names in MEDIA_INPUTS.values() for name in names))
        media = {name: model_kwargs.pop(name) for name in apart if name in model_kwargs}
        if expand_size > 1 and input_ids is not None:
            modality_ids = self.model.modality_ids(input_ids)
            for modality, names in MEDIA_INPUTS.items():
                for name in (n for n in names if media.get(n) is not None):
                    media[name] = repeat_media(media[name], modality_ids == MODALITIES.index(modality), expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **media}


def restarts_at_longer_rope(config: UniMoeTextConfig, length: int, past_key_values: Any) -> bool:
    """Whether a text of this length outgrows the short factors of "longrope" while the cache still holds keys of them.

    Keys that were turned by the short factors do not go with queries turned by the long ones, so the cache must be
    computed anew, once (Phi-3 in transformers does the same).
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "longrope" or not isinstance(past_key_values, Cache):
        return False
    past, border = past_key_values.get_seq_length(), rope["original_max_position_embeddings"]
    return 0 < past <= border < length


def repeat_media(media: torch.Tensor, mask_BS: torch.Tensor, expand_size: int) -> torch.Tensor:
    """Repeat every sample's items `expand_size` times, sample by sample; the mask marks their places in the text."""
    places_B = mask_BS.sum(dim=1).tolist()
    tokens_per_item = max(sum(places_B) // len(media), 1)
    counts = [places // tokens_per_item for places in places_B]
    return torch.cat([sample for sample in media.split(counts) for _ in range(expand_size)])


def require_texts(inputs: Iterable[Sequence[int]], config: UniMoeConfig) -> None:
    """Raises ModalityError if one of these texts, lists of token ids, has a placeholder of a medium."""
    names = {token_id: modality for modality, token_id in config.placeholder_ids.items() if token_id is not None}
    for index, ids in enumerate(inputs):
        found = next((token for token in ids if token in names), None)
        if found is not None:
            raise ModalityError(
                f"Text {index} has a placeholder for {names[found]}; continuous batching carries no media: give this "
                "text and its media to generate()."
            )


__all__ = ["UniMoeGenerationMixin", "repeat_media", "require_texts", "restarts_at_longer_rope"]
