"""What external vision models saw ("aux", MoAI), from the processor's tensors to what the mixers read.

Of every sample, aux is a text, looked up in the decoder's own table, and a picture of its segments, seen through the
model's own vision tower and image connector. It never enters the sequence: compressed, it is read by the mixers.

    aux_input_ids          [B, L] int64, the texts
    aux_pixel_values       [B, 3, H, W], the pictures; or aux_encoder_states [B, P, C], the tower's states of them
    aux_features           [B, A, H], in place of all these: embeddings
    aux_attention_mask     [B, L], or with the picture's places behind it [B, L + P]: false on padding. A sample without
                           a single true has no aux.
    prompt_mask            [B, S]: true on the prompt, false on answers; mixers leave answers alone
    expert_choice          [mixers, 2] int64: the expert that images and the one that text gets (0 aux, 1 the other of
                           both, 2 its own kind) in every mixer, in place of the gates

A sample is mixed when it has aux, an image and text. All happens while a prompt is read, at once: later tokens are the
plain decoder's.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils import logging

from .configuration_unimoe import UniMoeConfig
from .configuration_unimoe_text import MODALITIES
from .errors_unimoe import ConfigurationError, ModalityError, UniMoeError
from .idle_branches_unimoe import must_run, not_training, without_value, zero_medium
from .modeling_unimoe_moai import SOURCES, Mixing, Rows, UniMoeCompressor

logger = logging.get_logger(__name__)

_FEATURES = ("aux_input_ids", "aux_pixel_values", "aux_encoder_states", "aux_features")
AUX_INPUTS = (*_FEATURES, "aux_attention_mask", "prompt_mask", "expert_choice")


class AuxiliaryMixin:
    """The compressor of a `UniMoeModel`, and everything that leads to what the mixers read."""

    config: UniMoeConfig
    training: bool

    def build_auxiliary(self, config: UniMoeConfig) -> None:
        """Create the compressor, None without mixers."""
        text = config.text_config
        has_mixers = text.mixer_config is not None
        self.aux_compressor = UniMoeCompressor(text.mixer_config, text.hidden_size) if has_mixers else None

    def get_aux_features(
        self,
        aux_input_ids: torch.Tensor | None = None,
        aux_attention_mask: torch.Tensor | None = None,
        aux_pixel_values: torch.Tensor | None = None,
        aux_encoder_states: torch.Tensor | None = None,
        aux_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Aux tokens before compression, [B, A, H], the text's before the picture's, and their mask [B, A], bool.

        Raises:
            ModalityError: nothing was given, or things that do not go together.
        """
        if aux_features is not None:
            if aux_input_ids is not None or aux_pixel_values is not None or aux_encoder_states is not None:
                raise ModalityError("aux_features stand in place of aux text and pictures: give one or the other.")
            parts = [aux_features]
        else:
            table = self.get_input_embeddings()  # type: ignore[attr-defined]
            parts = [] if aux_input_ids is None else [table(aux_input_ids)]
            if aux_pixel_values is not None or aux_encoder_states is not None:
                connected = self.get_image_features(  # type: ignore[attr-defined]
                    pixel_values=aux_pixel_values, image_encoder_states=aux_encoder_states
                )
                parts.append(connected.pooler_output)
        if not parts or len({len(part) for part in parts}) > 1:
            sizes = [list(part.shape) for part in parts]
            raise ModalityError(
                f"aux_attention_mask and the like need aux text or pictures, one of each per sample; got features {sizes}."
            )
        features = torch.cat([part.to(parts[0].device, parts[0].dtype) for part in parts], dim=1)
        return features, _aux_mask(aux_attention_mask, features, parts[0].shape[1])

    def mixing(
        self,
        inputs: dict[str, torch.Tensor | None],
        modality_ids: torch.Tensor | None,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Mixing | None, torch.Tensor | None]:
        """What the mixers of this forward pass read and write, or None where they rest.

        Also, in training, a scalar 0 through which a compressor that rests is part of the graph.

        Args:
            inputs: values of `AUX_INPUTS`, by name.
            modality_ids: [B, S]; needed with aux.
            tokens: [B, S, ...], ids or embeddings.
            attention_mask: [B, S]; anything else leaves it to prompt_mask to say what is padding.

        Raises:
            ModalityError: aux for a model without mixers, or for a sample without image.
            UniMoeError: aux come with a part of a text only.
            ConfigurationError: gradients are checkpointed in the reentrant way.
        """
        given = any(inputs[name] is not None for name in _FEATURES)
        if given and self.aux_compressor is None:
            raise ModalityError("This model has no mixers (mixer_config is None), so it takes no aux: leave them out.")
        if not given:
            return None, self._idle_compressor(seen=False)
        if modality_ids is None:
            raise ModalityError("inputs_embeds with aux need mm_token_type_ids to say where images are: give them.")
        if self._joins:
            _refuse_reentrant_checkpointing(self.language_model)  # type: ignore[attr-defined]
        features, aux_mask = self.get_aux_features(
            **{name: inputs[name] for name in (*_FEATURES, "aux_attention_mask")}
        )
        seen = inputs["aux_pixel_values"] is not None
        idle = self._idle_picture() if not seen else None
        places = _prompt_places(inputs["prompt_mask"], tokens, attention_mask, past_key_values)
        image_mask = (modality_ids == MODALITIES.index("image")) & places
        language_mask = (modality_ids != MODALITIES.index("image")) & places
        samples = _mixed_samples(aux_mask, image_mask, language_mask)
        if not len(samples):
            return None, self._idle_compressor(seen)
        padding_counts = self.config.text_config.mixer_config.compress_aux_padding
        valid = None if padding_counts or bool(aux_mask[samples].all()) else aux_mask[samples]
        aux = self.aux_compressor(features[samples], valid)
        choices = self._choices(inputs["expert_choice"])
        if choices is not None and self._joins:  # perhaps no mixer draws the expert that reads aux
            idle = without_value(aux) if idle is None else idle + without_value(aux)
        return Mixing(aux, Rows.of(image_mask, samples), Rows.of(language_mask, samples), choices), idle

    @property
    def _joins(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _choices(self, forced: torch.Tensor | None) -> tuple[tuple[int, int], ...] | None:
        """The experts of this step, drawn here, once, so that checkpointed layers see the same ones again."""
        mixer = self.config.text_config.mixer_config
        if forced is None:
            if not self.training or mixer.expert_choice == "gates":
                return None
            forced = torch.randint(len(SOURCES), (len(mixer.layers), 2))
        if forced.shape != (len(mixer.layers), 2) or not bool(((forced >= 0) & (forced < len(SOURCES))).all()):
            raise UniMoeError(
                f"expert_choice is {forced.tolist()}; give {len(mixer.layers)} pairs (image, text) of numbers from 0 to "
                f"{len(SOURCES) - 1}: {', '.join(SOURCES)}."
            )
        return tuple((int(image), int(language)) for image, language in forced.tolist())

    def _idle_compressor(self, seen: bool) -> torch.Tensor | None:
        """See `idle_branches_unimoe`; `seen`: a picture did go through the vision tower."""
        if not self._joins or self.aux_compressor is None:
            return None
        idle = [self._idle_picture()] if not seen else []
        if must_run(self.aux_compressor):
            token = self.aux_compressor.latents.new_zeros(1, 1, self.config.text_config.hidden_size)
            idle.append(without_value(self.aux_compressor(token)))
        idle = [value for value in idle if value is not None]
        return torch.stack(idle).sum() if idle else None

    def _idle_picture(self) -> torch.Tensor | None:
        """Where other ranks run the vision tower on aux pictures and may wait for this one."""
        tower, connector = self.vision_tower, self.image_connector  # type: ignore[attr-defined]
        if not self._joins or connector is None or not must_run(tower):
            return None
        scale = max(self.config.vision_scales or [1])
        picture = zero_medium("image", tower.config, scale, next(connector.parameters()).device)
        with not_training(tower):
            return without_value(self.get_image_features(pixel_values=picture).pooler_output)  # type: ignore[attr-defined]


def prompt_before_answers(labels: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: true before the first token that a sample learns; text that follows an answer knows of it."""
    return (labels != -100).cumsum(dim=1) == 0


def prompt_to_continue(
    prompt_mask: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """[B, S]: the prompt_mask with which generation starts; unless one is given, all that is no padding is prompt.

    Raises:
        UniMoeError: the mask that was given does not fit the text; one that ends earlier leaves the rest to be answer.
    """
    if prompt_mask is None:
        return torch.ones_like(input_ids) if attention_mask is None else attention_mask
    # With inputs_embeds there are no ids yet, and nothing to compare.
    if prompt_mask.ndim != 2 or 0 < input_ids.shape[1] < prompt_mask.shape[1]:
        raise UniMoeError(
            f"prompt_mask has shape {list(prompt_mask.shape)}, the text {list(input_ids.shape)}: give one value per token."
        )
    return prompt_mask


def continued_prompt(prompt_mask: torch.Tensor, length: int, cached: int = 0) -> torch.Tensor:
    """The mask of a prompt to which tokens were generated since; they are no part of it.

    Args:
        length: of the text that is read now.
        cached: tokens that a cache holds of it already.

    Raises:
        UniMoeError: not all of the prompt is read now.
    """
    marked = prompt_mask.shape[1]
    if length < marked and cached:
        raise UniMoeError(
            f"past_key_values hold {cached} tokens already, so {length} of the prompt's {marked} are left to read, but mixers "
            "need the whole prompt at once: leave past_key_values out to have it read with aux, or go on without aux and "
            "prompt_mask."
        )
    if length < marked:
        raise UniMoeError(
            f"Only {length} of the prompt's {marked} tokens are read at once, but mixers need them all: leave "
            "prefill_chunk_size out."
        )
    return torch.nn.functional.pad(prompt_mask, (0, length - marked))


def _refuse_reentrant_checkpointing(decoder: nn.Module) -> None:
    """All mixers read the same compressed aux, through which reentrant checkpoints would go back once per layer."""
    for layer in decoder.layers:  # type: ignore[union-attr]
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None) if layer.gradient_checkpointing else None
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ConfigurationError(
                "Gradient checkpointing is on with use_reentrant=True, with which mixers cannot be trained: call "
                'gradient_checkpointing_enable({"use_reentrant": False}), or give the trainer '
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )


def _aux_mask(mask: torch.Tensor | None, features: torch.Tensor, texts: int) -> torch.Tensor:
    """[B, A] bool; a mask of texts alone holds for the pictures of all samples that have any text."""
    if mask is None:
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    mask, pictures = mask.bool().to(features.device), features.shape[1] - texts
    if mask.shape[1:] == (texts,) and pictures:
        mask = torch.cat((mask, mask.any(dim=1, keepdim=True).expand(-1, pictures)), dim=1)
    if mask.shape != features.shape[:2]:
        raise ModalityError(
            f"aux_attention_mask has shape {list(mask.shape)}; the aux tokens are {list(features.shape[:2])}, of which "
            f"{texts} come first: give one per token, or one per token of the first part."
        )
    return mask


def _prompt_places(
    prompt_mask: torch.Tensor | None, tokens: torch.Tensor, attention_mask: Any, past_key_values: Cache | None
) -> torch.Tensor:
    """[B, S] bool: what is prompt and no padding."""
    if past_key_values is not None and int(past_key_values.get_seq_length()):
        raise UniMoeError(
            "Aux came with a cache that already holds a part of the text, but mixers need the whole prompt at once: give "
            "aux with the first part, and with it the whole prompt."
        )
    places = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    for name, mask in (("attention_mask", attention_mask), ("prompt_mask", prompt_mask)):
        if getattr(mask, "ndim", 0) != 2:
            continue
        if mask.shape != places.shape:
            raise UniMoeError(
                f"{name} has shape {list(mask.shape)}, the text {list(places.shape)}: they must be equal."
            )
        places = places & mask.bool().to(places.device)
    return places


def _mixed_samples(aux_mask: torch.Tensor, image_mask: torch.Tensor, language_mask: torch.Tensor) -> torch.Tensor:
    """Indices of the samples that are mixed. Raises ModalityError where aux have no image to go with."""
    if len(aux_mask) != len(image_mask):
        raise ModalityError(
            f"Aux are given for {len(aux_mask)} samples, the text has {len(image_mask)}: give one each."
        )
    has = torch.stack([mask.any(dim=1).to(aux_mask.device) for mask in (aux_mask, image_mask, language_mask)]).tolist()
    for sample, (aux, image, language) in enumerate(zip(*has, strict=True)):
        if aux and not (image and language):
            raise ModalityError(
                f"Sample {sample} has aux but no {'text' if image else 'image'} in its prompt: give its aux_attention_mask "
                "zeros, or leave aux out."
            )
        if image and not aux:
            logger.warning_once("Some samples have an image but no aux: the mixers leave them as they are.")
    return torch.tensor([i for i, aux in enumerate(has[0]) if aux], device=image_mask.device, dtype=torch.long)


__all__ = ["AUX_INPUTS", "AuxiliaryMixin", "continued_prompt", "prompt_before_answers", "prompt_to_continue"]
