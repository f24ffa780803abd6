"""Media to features: frozen towers encode, connectors map their states to embeddings of the decoder.

What a modality is called in messages, in the configuration, in the text and in `forward`:

    modality  content item  tower          connector         placeholder  raw input            cached input
    image     image         vision_config  image_connector   <image>      pixel_values         image_encoder_states
    video     video         vision_config  video_connector*  <video>      pixel_values_videos  video_encoder_states
    speech    audio         speech_config  speech_connector  <audio>      speech_features      speech_encoder_states
    sound     audio         audio_config** sound_connector   <sound>      audio_features       sound_encoder_states

    *  None: the image connector    ** None: the speech tower

One audio item goes through both branches, unless its "encoder" names one of them. BEATs also takes audio_padding_mask.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import can_return_tuple

from .configuration_unimoe import UniMoeConfig, UniMoeConnectorConfig
from .configuration_unimoe_text import MODALITIES
from .connectors_unimoe import build_connector
from .errors_unimoe import ConfigurationError, ModalityError, UniMoeError
from .idle_branches_unimoe import must_run, not_training, without_value, zero_medium
from .modeling_unimoe_beats import UniMoeBeatsModel
from .multiscale_unimoe import encode_scales

# Inputs that belong to media rather than to token positions, by modality.
MEDIA_INPUTS = {
    "image": ("pixel_values", "image_encoder_states"),
    "video": ("pixel_values_videos", "video_encoder_states"),
    "speech": ("speech_features", "speech_encoder_states"),
    "sound": ("audio_features", "audio_padding_mask", "sound_encoder_states"),
}
# Frames of 10 ms that an audio tower hears at once outside of training: four minutes. Longer recordings take turns, so
# that their memory does not grow with their length.
FRAMES_AT_ONCE = 24_000


def build_tower(config: Any) -> PreTrainedModel | None:
    """The encoder of a tower configuration; of a Whisper model only its encoder."""
    if config is None:
        return None
    # A choice of experts implementation reaches every part of the configuration; an encoder without experts refuses it.
    config._experts_implementation = None
    if config.model_type == "whisper":
        return WhisperEncoder(config)
    if config.model_type == "unimoe_beats":
        return UniMoeBeatsModel(config)
    return AutoModel.from_config(config)


class MediaEncoderMixin:
    """Towers and connectors of a `UniMoeModel`, and everything that runs through them."""

    config: UniMoeConfig
    training: bool

    def build_encoders(self, config: UniMoeConfig) -> None:
        """Create the towers and connectors that the configuration names; the others are None."""
        self.vision_tower = build_tower(config.vision_config)
        self.speech_tower = build_tower(config.speech_config)
        self.audio_tower = build_tower(config.audio_config)
        self.image_connector = _build_optional_connector(config.image_connector)
        self.video_connector = _build_optional_connector(config.video_connector)
        self.speech_connector = _build_optional_connector(config.speech_connector)
        self.sound_connector = _build_optional_connector(config.sound_connector)
        self.freeze_towers()

    def freeze_towers(self) -> None:
        """Take the towers out of training, if the configuration says so."""
        if self.config.freeze_towers:
            for tower in self.towers():
                tower.requires_grad_(False)

    def towers(self) -> list[PreTrainedModel]:
        return [tower for tower in (self.vision_tower, self.speech_tower, self.audio_tower) if tower is not None]

    def train(self, mode: bool = True) -> "MediaEncoderMixin":
        """As usual, except that frozen towers stay in eval mode: batch norms and dropout must not move them."""
        super().train(mode)
        for tower in self.towers():
            if not _is_trainable(tower):
                tower.eval()
        return self

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """States [n, P, C] of the vision tower for images [n, 3, H, W], pooled to the token grid."""
        tower = self._require(self.vision_tower, "image", "vision_config")
        channels = getattr(tower.config, "num_channels", 3)
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ModalityError(
                f"Pixels of images or frames have shape {list(pixel_values.shape)}; give [n, {channels}, height, width]."
            )
        scales = self.config.vision_scales
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trainable(tower)):
            if scales is None:
                return self._pool_grid(self._tower_states(pixel_values))
            states = encode_scales(self._patch_states, pixel_values, scales, tower.config.image_size)
            return self._pool_patches(states)

    def encode_video(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """States [n, F, P, C] of the vision tower for videos [n, F, 3, H, W]."""
        states = self.encode_image(pixel_values_videos.flatten(0, 1))
        return states.unflatten(0, pixel_values_videos.shape[:2])

    def encode_speech(self, speech_features: torch.Tensor) -> torch.Tensor:
        """States [n, T, C] of the speech tower for log-mel windows [n, mels, frames]."""
        tower = self._require(self.speech_tower, "audio", "speech_config")
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trainable(tower)):
            return self._in_turns(tower, speech_features.shape[2], speech_features)

    def encode_sound(
        self, audio_features: torch.Tensor, audio_padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States [n, T, C] of the sound tower for filter-bank windows [n, frames, mels].

        audio_padding_mask is bool [n, samples], True on padding; only BEATs takes it. Where the sound branch has no
        tower of its own, audio_features are log-mel windows for the speech tower.
        """
        if self._sound_reads_speech_tower:
            return self.encode_speech(audio_features)
        tower = self._require(self.audio_tower, "audio", "audio_config")
        kwargs = {} if audio_padding_mask is None else {"padding_mask": audio_padding_mask}
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trainable(tower)):
            return self._in_turns(tower, audio_features.shape[1], audio_features, **kwargs)

    def _in_turns(
        self, tower: PreTrainedModel, frames: int, windows: torch.Tensor, **kwargs: torch.Tensor
    ) -> torch.Tensor:
        """States of all windows, of so many frames each; not more of them at once than `FRAMES_AT_ONCE`."""
        size = len(windows) if self.training else max(1, FRAMES_AT_ONCE // max(frames, 1))
        states = [
            tower(
                windows[start : start + size].to(tower.dtype),
                return_dict=True,
                **{name: value[start : start + size] for name, value in kwargs.items()},
            ).last_hidden_state
            for start in range(0, max(len(windows), 1), max(size, 1))
        ]
        return states[0] if len(states) == 1 else torch.cat(states)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, image_encoder_states: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Tower states and, in `pooler_output`, connected features [n, N, H] of images."""
        states = self.encode_image(pixel_values) if image_encoder_states is None else image_encoder_states
        return _connect(self.image_connector, states)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        video_encoder_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Tower states and, in `pooler_output`, connected features of videos.

        [n, N, H] with `video_pooling="mean"` (frames averaged after the connector, Uni-MoE), else [n, F * N, H].
        """
        states = self.encode_video(pixel_values_videos) if video_encoder_states is None else video_encoder_states
        connector = self.image_connector if self.video_connector is None else self.video_connector
        output = _connect(connector, states.flatten(0, 1))
        features = output.pooler_output.unflatten(0, states.shape[:2])
        output.pooler_output = features.mean(dim=1) if self.config.video_pooling == "mean" else features.flatten(1, 2)
        return output

    @can_return_tuple
    def get_audio_features(
        self,
        speech_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        audio_padding_mask: torch.Tensor | None = None,
        speech_encoder_states: torch.Tensor | None = None,
        sound_encoder_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Tower states and connected features [n, N, H] of audio windows, of one branch.

        speech_features or speech_encoder_states select the speech branch, the others the sound branch. To get both,
        call it once per branch.
        """
        if speech_features is not None or speech_encoder_states is not None:
            states = self.encode_speech(speech_features) if speech_encoder_states is None else speech_encoder_states
            return _connect(self.speech_connector, states)
        if sound_encoder_states is None:
            sound_encoder_states = self.encode_sound(audio_features, audio_padding_mask)
        return _connect(self.sound_connector, sound_encoder_states)

    def media_features(self, **media: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Connected features by modality, for the media that are there.

        Also, in training, a scalar 0 through which the branches of the other modalities are part of the graph.
        """
        media = {name: value for name, value in media.items() if value is not None}
        given = {m: {k: media[k] for k in names if k in media} for m, names in MEDIA_INPUTS.items()}
        self._share_speech_states(given)
        features, idle = {}, []
        joins = self.training and torch.is_grad_enabled()
        # Always in this order, and every branch once: ranks that share out weights wait for each other in each.
        for modality, inputs in given.items():
            if inputs:
                features[modality] = self._branch(modality)(**inputs).pooler_output
            elif joins:
                idle += self._idle_branch(modality)
        return features, torch.stack(idle).sum() if idle else None

    def _branch(self, modality: str) -> Callable[..., BaseModelOutputWithPooling]:
        get = {"image": self.get_image_features, "video": self.get_video_features}
        return get.get(modality, self.get_audio_features)

    def _idle_branch(self, modality: str) -> list[torch.Tensor]:
        """See `idle_branches_unimoe`."""
        tower, connector = {
            "image": (self.vision_tower, self.image_connector),
            "video": (self.vision_tower, self.video_connector or self.image_connector),
            "speech": (self.speech_tower, self.speech_connector),
            "sound": (self.audio_tower or self.speech_tower, self.sound_connector),
        }[modality]
        if connector is None or not (must_run(connector) or must_run(tower)):
            return []
        config = self.config.connectors[modality]
        reference = next(connector.parameters())
        if must_run(tower):
            medium = zero_medium(modality, tower.config, max(self.config.vision_scales or [1]), reference.device)
            with not_training(tower):
                return [without_value(self._branch(modality)(**{MEDIA_INPUTS[modality][0]: medium}).pooler_output)]
        return [without_value(connector(reference.new_zeros(1, 1, config.input_size)))]

    def _share_speech_states(self, given: dict[str, dict[str, torch.Tensor]]) -> None:
        """Where both audio branches read the speech tower and got the same windows, run it once."""
        speech, sound = given["speech"].get("speech_features"), given["sound"].get("audio_features")
        if not self._sound_reads_speech_tower or speech is None or sound is None:
            return
        if speech.shape == sound.shape and torch.equal(speech, sound):
            states = self.encode_speech(speech)
            given["speech"], given["sound"] = {"speech_encoder_states": states}, {"sound_encoder_states": states}

    @property
    def _sound_reads_speech_tower(self) -> bool:
        return self.sound_connector is not None and self.audio_tower is None

    def _require(self, tower: PreTrainedModel | None, kind: str, field: str) -> PreTrainedModel:
        if tower is None:
            raise ModalityError(
                f"This model got {kind} input but has no tower for it ({field} is None): leave it out."
            )
        return tower

    def _tower_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[n, C, h, w] maps, or [n, P, C] patches after a class token, if the tower has one."""
        outputs = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype), output_hidden_states=True, return_dict=True
        )
        return outputs.hidden_states[self.config.vision_feature_layer]

    def _patch_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[n, P, C] of all patches, without class token."""
        return self._without_class_token(self._tower_states(pixel_values))

    def _without_class_token(self, states: torch.Tensor) -> torch.Tensor:
        if states.dim() == 4:
            return states.flatten(2).transpose(1, 2)
        return states[:, 1:] if self.config.vision_feature_select_strategy == "patch" else states

    def _pool_grid(self, states: torch.Tensor) -> torch.Tensor:
        """[n, C, h, w] maps or [n, P, C] patches -> [n, positions, C]."""
        if states.dim() == 4 and self.config.vision_token_grid is not None:
            return _pooled(states, self.config.vision_token_grid)
        return self._pool_patches(self._without_class_token(states))

    def _pool_patches(self, states: torch.Tensor) -> torch.Tensor:
        grid = self.config.vision_token_grid
        return states if grid is None else _pooled(_square_map(states, self.config), grid)


def check_text_inputs(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, mm_token_type_ids: torch.Tensor | None
) -> None:
    """Raise unless exactly one of ids [B, S] and embeddings [B, S, H] is there, not empty, and the types fit it."""
    tokens = inputs_embeds if input_ids is None else input_ids
    if tokens is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    if tokens.numel() == 0:
        raise UniMoeError(f"The text is empty: its shape is {list(tokens.shape)}; give one token at least.")
    if mm_token_type_ids is not None and mm_token_type_ids.shape != tokens.shape[:2]:
        raise ModalityError(
            f"mm_token_type_ids has shape {list(mm_token_type_ids.shape)}, the text {list(tokens.shape[:2])}: "
            "give one per token, or leave them out where input_ids are given."
        )


def begins_text(input_ids: torch.Tensor, past_key_values: Cache | None) -> bool:
    """Whether these tokens are the first of their texts, so that the media of all their placeholders must come along.

    Never while compiling: looking for placeholders would break the graph of a text without any.
    """
    if torch.compiler.is_compiling():
        return False
    if past_key_values is None:
        return True
    # Not asked of every generated token: the length of a static cache is on the device.
    return input_ids.shape[1] > 1 and int(past_key_values.get_seq_length()) == 0


def place_features(
    inputs_embeds: torch.Tensor,
    modality_ids: torch.Tensor | None,
    features: dict[str, torch.Tensor],
    needed: Collection[str] = (),
) -> torch.Tensor:
    """Embeddings [B, S, H] with each modality's features [n, N, H], in order, at the positions of its placeholders.

    Args:
        modality_ids: of every position, [B, S]; may be None without features.
        needed: modalities whose placeholders must not stand without features.

    Raises:
        ModalityError: the numbers differ, or modality_ids are needed.
    """
    counted = list(dict.fromkeys([*features, *needed]))
    if not counted:
        return inputs_embeds
    if modality_ids is None:
        raise ModalityError("inputs_embeds with media need mm_token_type_ids to say where the media go: give them.")
    masks = {modality: modality_ids == MODALITIES.index(modality) for modality in counted}
    # The one host sync buys errors that say what is wrong.
    places = torch.stack([mask.sum() for mask in masks.values()]).tolist()
    for modality, count in zip(counted, places, strict=True):
        feature = features.get(modality)
        if feature is None:
            if count:
                names = " or ".join(name for name in MEDIA_INPUTS[modality] if name != "audio_padding_mask")
                raise ModalityError(
                    f"The text has {count} {modality} placeholders but no {modality} features: give {names}, as the "
                    "processor does, or leave the placeholders out."
                )
            continue
        if count != feature.shape[0] * feature.shape[1]:
            raise ModalityError(
                f"The text has {count} {modality} placeholders but the media give {feature.shape[0] * feature.shape[1]}"
                f" features ({feature.shape[0]} items of {feature.shape[1]}): use the processor, and do not truncate "
                "its output."
            )
        feature = feature.to(inputs_embeds.device, inputs_embeds.dtype)
        inputs_embeds = inputs_embeds.masked_scatter(masks[modality].unsqueeze(-1), feature)
    return inputs_embeds


def _pooled(maps: torch.Tensor, grid: int) -> torch.Tensor:
    """[n, C, h, w] -> [n, grid * grid, C]."""
    return nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


def _square_map(states: torch.Tensor, config: UniMoeConfig) -> torch.Tensor:
    """[n, P, C] patches -> [n, C, side, side]."""
    patches = states.shape[1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConfigurationError(
            f"vision_token_grid is {config.vision_token_grid}, but the vision tower gives {patches} patches, which are no "
            f"square map: set vision_token_grid to None, or change vision_feature_select_strategy (now "
            f"{config.vision_feature_select_strategy!r}; 'patch' drops a first class token, 'full' keeps everything)."
        )
    return states.transpose(1, 2).unflatten(2, (side, side))


def _build_optional_connector(config: UniMoeConnectorConfig | None) -> nn.Module | None:
    return None if config is None else build_connector(config)


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _connect(connector: nn.Module | None, states: torch.Tensor) -> BaseModelOutputWithPooling:
    if connector is None:
        raise ModalityError("This model has no connector for the given media: leave them out.")
    return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=connector(states))
