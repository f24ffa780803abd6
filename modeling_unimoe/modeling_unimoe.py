"""Uni-MoE: frozen towers, one connector per modality, a sparse decoder.

A batch flows encode -> connect -> merge at the placeholders -> decode -> head. All media of a batch are flat, in the
order of their placeholders, and every item of a modality yields the same number of features.

Every input may be given raw (`pixel_values`, ...) or as the states of its frozen tower (`image_encoder_states`, ...),
which `encode_image` and its siblings return; training from cached states skips the towers.
"""

from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .auxiliary_unimoe import AUX_INPUTS, AuxiliaryMixin, prompt_before_answers
from .configuration_unimoe import UniMoeConfig
from .configuration_unimoe_text import MODALITIES
from .encoding_unimoe import MEDIA_INPUTS, MediaEncoderMixin, begins_text, check_text_inputs, place_features
from .generation_unimoe import UniMoeGenerationMixin
from .idle_branches_unimoe import is_shared_out
from .inputs_unimoe import UniMoeInputs, taken
from .losses_unimoe import balance_terms
from .modeling_unimoe_text import UniMoeTextModel
from .outputs_unimoe import UniMoeCausalLMOutputWithPast, UniMoeModelOutputWithPast
from .pretrained_unimoe import UniMoePreTrainedModel
from .token_types_unimoe import require_agreeing_types, require_known_types, require_no_need_of_types


class UniMoeModel(MediaEncoderMixin, AuxiliaryMixin, UniMoePreTrainedModel):
    """Towers, connectors and decoder, without a language-modelling head."""

    def __init__(self, config: UniMoeConfig) -> None:
        super().__init__(config)
        self.build_encoders(config)
        self.build_auxiliary(config)
        self.language_model = UniMoeTextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def modality_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Modality id of every position, from its placeholder token; int64, shape of input_ids."""
        ids = torch.zeros_like(input_ids)
        for modality, token_id in self.config.placeholder_ids.items():
            if token_id is not None:
                ids = ids.masked_fill(input_ids == token_id, MODALITIES.index(modality))
        return ids

    def routing_ids(self, modality_ids: torch.Tensor) -> torch.Tensor:
        """The modality as which every position is routed, [B, S]: its own, unless `route_run_end_as_text`."""
        if not self.config.route_run_end_as_text:
            return modality_ids
        following = nn.functional.pad(modality_ids[:, 1:], (0, 1), value=-1)
        return modality_ids.masked_fill(modality_ids != following, MODALITIES.index("text"))

    def token_groups(self, modality_ids: torch.Tensor) -> torch.Tensor | None:
        """Index of every position's routing group, [B, S]; None with one group."""
        return self.language_model.token_groups(modality_ids, self.routing_ids(modality_ids))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[UniMoeInputs],
    ) -> UniMoeModelOutputWithPast:
        """Run the model; media and aux are given by the names of `UniMoeInputs`.

        mm_token_type_ids: [B, S] modality ids, for inputs_embeds: with input_ids they follow from the placeholder
        tokens, and others are refused.

        Raises:
            ModalityError: media without tower, a number of features that differs from the placeholders (0 features
                included, where a text begins), or mm_token_type_ids that are missing, unknown or do not fit.
        """
        check_text_inputs(input_ids, inputs_embeds, mm_token_type_ids)
        features, idle_branches = self.media_features(**taken(kwargs, chain(*MEDIA_INPUTS.values())))
        aux_inputs = taken(kwargs, AUX_INPUTS)
        needed: tuple[str, ...] = ()
        if kwargs.get("cache") is None:
            needed = self._needed_media(input_ids, past_key_values)
        else:
            # Continuous batching goes on with texts, which `generate_batch` has looked through. Its `is_causal` says what
            # the mask says, and transformers would write it into the configuration, for all threads to see.
            kwargs.pop("is_causal", None)
        packed = "attention_instances" in kwargs
        mm_token_type_ids, inputs_embeds = self._typed(input_ids, inputs_embeds, mm_token_type_ids, packed)
        inputs_embeds = place_features(inputs_embeds, mm_token_type_ids, features, needed)
        mixing, idle = self.mixing(aux_inputs, mm_token_type_ids, inputs_embeds, attention_mask, past_key_values)
        if idle is not None:
            idle_branches = idle if idle_branches is None else idle_branches + idle.to(idle_branches.device)
        if idle_branches is not None and is_shared_out(self.language_model):
            # Ranks with media go back through the decoder to their connectors; those without must go along.
            inputs_embeds = inputs_embeds + idle_branches.to(inputs_embeds.dtype)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=None if mm_token_type_ids is None else self.routing_ids(mm_token_type_ids),
            image_mask=self._image_mask(mm_token_type_ids) if input_ids is None or "image" in features else None,
            mixing=mixing,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return UniMoeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
            mm_token_type_ids=mm_token_type_ids,
            idle_branches=idle_branches,
        )

    def _needed_media(self, input_ids: torch.Tensor | None, past_key_values: Cache | None) -> tuple[str, ...]:
        """Modalities that a text with their placeholders needs; a text that goes on had them before."""
        if input_ids is None or not begins_text(input_ids, past_key_values):
            return ()
        return tuple(name for name, token_id in self.config.placeholder_ids.items() if token_id is not None)

    def _typed(
        self, ids: torch.Tensor | None, embeds: torch.Tensor | None, types: torch.Tensor | None, packed: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Modality ids and embeddings of a text that is given in either form; `packed`: by vLLM, without types."""
        if ids is not None:
            from_ids = self.modality_ids(ids)
            require_agreeing_types(types, from_ids)
            return from_ids, self._embed(ids, from_ids)
        require_known_types(types)
        if packed and types is None:
            require_no_need_of_types(self.config.text_config)
        return types, embeds

    def _image_mask(self, modality_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Where partial LoRA acts, [B, S]; None for a model without it."""
        if self.config.text_config.plora_config is None or modality_ids is None:
            return None
        return modality_ids == MODALITIES.index("image")

    def _embed(self, input_ids: torch.Tensor, mm_token_type_ids: torch.Tensor) -> torch.Tensor:
        # Placeholders are replaced anyway, and their ids may lie outside the embedding table.
        return self.get_input_embeddings()(input_ids.masked_fill(mm_token_type_ids > 0, 0))


class UniMoeForCausalLM(UniMoePreTrainedModel, UniMoeGenerationMixin):
    """The model with its head: text out, any mix of text, images, videos and audio in."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: UniMoeConfig) -> None:
        super().__init__(config)
        self.model = UniMoeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    def get_audio_features(self, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_audio_features(**kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        speech_features: torch.FloatTensor | None = None,
        audio_features: torch.FloatTensor | None = None,
        audio_padding_mask: torch.BoolTensor | None = None,
        image_encoder_states: torch.FloatTensor | None = None,
        video_encoder_states: torch.FloatTensor | None = None,
        speech_encoder_states: torch.FloatTensor | None = None,
        sound_encoder_states: torch.FloatTensor | None = None,
        aux_input_ids: torch.LongTensor | None = None,
        aux_attention_mask: torch.Tensor | None = None,
        aux_pixel_values: torch.FloatTensor | None = None,
        aux_encoder_states: torch.FloatTensor | None = None,
        aux_features: torch.FloatTensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        expert_choice: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UniMoeCausalLMOutputWithPast:
        """Run the model; media and aux as in `UniMoeInputs`, of which `generate` wants to see every name here.

        labels: [B, S] token ids, -100 where nothing is learned; if that is everywhere, the loss is 0.
        output_router_logits: return them; where a balance term needs them they are collected anyway.
        logits_to_keep: compute logits of only the last n positions (0 means all), or of the given positions.
        """
        text_config = self.config.text_config
        returns_routers = text_config.output_router_logits if output_router_logits is None else output_router_logits
        needs_balance = labels is not None and bool(text_config.sparse_layers)
        if labels is not None and prompt_mask is None and self.model.aux_compressor is not None:
            prompt_mask = prompt_before_answers(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            speech_features=speech_features,
            audio_features=audio_features,
            audio_padding_mask=audio_padding_mask,
            image_encoder_states=image_encoder_states,
            video_encoder_states=video_encoder_states,
            speech_encoder_states=speech_encoder_states,
            sound_encoder_states=sound_encoder_states,
            aux_input_ids=aux_input_ids,
            aux_attention_mask=aux_attention_mask,
            aux_pixel_values=aux_pixel_values,
            aux_encoder_states=aux_encoder_states,
            aux_features=aux_features,
            prompt_mask=prompt_mask,
            expert_choice=expert_choice,
            use_cache=use_cache,
            output_router_logits=returns_routers or needs_balance,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        losses = self._losses(outputs, logits, labels, attention_mask, **kwargs) if labels is not None else {}
        return UniMoeCausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if returns_routers else None,
            idle_branches=outputs.idle_branches,
            **losses,
        )

    def _losses(
        self,
        outputs: UniMoeModelOutputWithPast,
        logits: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        config = self.config.text_config
        ce_loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        targets = labels[:, 1:] if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
        learned = (targets != -100).sum().to(ce_loss.device)
        # Where nothing is learned the mean is 0 / 0: NaN.
        ce_loss = torch.where(learned > 0, ce_loss, 0.0)
        loss = ce_loss if outputs.idle_branches is None else ce_loss + outputs.idle_branches.to(ce_loss.device)
        if not outputs.router_logits:
            return {"loss": loss, "ce_loss": ce_loss}
        modality_ids = torch.zeros_like(labels) if outputs.mm_token_type_ids is None else outputs.mm_token_type_ids
        groups = self.model.token_groups(modality_ids)
        share = _share_of_batch(learned, kwargs.get("num_items_in_batch"))
        terms = balance_terms(outputs.router_logits, config, modality_ids, groups, attention_mask)
        return {
            "loss": loss + terms.weighted * share,
            "ce_loss": ce_loss,
            "group_aux_losses": terms.aux_loss_G,
            **terms.losses,
        }


def _share_of_batch(learned: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Share of an accumulated batch that a micro-batch holds, so that balance terms are averaged, not summed."""
    if num_items_in_batch is None:
        return (learned > 0).float()
    return learned / torch.as_tensor(num_items_in_batch, device=learned.device).clamp(min=1)


__all__ = ["UniMoeForCausalLM", "UniMoeModel", "UniMoePreTrainedModel"]
