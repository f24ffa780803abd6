"""Configuration of a Uni-MoE model: one decoder, optional towers, one connector per modality, routing as data."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from .configuration_unimoe_beats import UniMoeBeatsConfig
from .configuration_unimoe_text import UniMoeTextConfig
from .errors_unimoe import ConfigurationError
from .validation_unimoe import (
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_IDS_BEYOND_VOCABULARY,
    MAX_INTERMEDIATE_SIZE,
    MAX_LABELS,
    MAX_LAYERS,
    MAX_QUERIES,
    MAX_VISION_SCALE,
    require_range,
    require_sizes,
    warn_of_misspellings,
)

# Which class is in which file of a folder that carries this code; `config.json` of such a folder holds it.
AUTO_MAP = {
    "AutoConfig": "configuration_unimoe.UniMoeConfig",
    "AutoModel": "modeling_unimoe.UniMoeModel",
    "AutoModelForCausalLM": "modeling_unimoe.UniMoeForCausalLM",
    "AutoModelForImageTextToText": "modeling_unimoe.UniMoeForCausalLM",
    "AutoModelForMultimodalLM": "modeling_unimoe.UniMoeForCausalLM",
}

# What transformers' models, as towers and inside connectors, call their sizes.
_LARGEST_INSIDE = {
    # Whisper's own names come first, because it answers to the general ones too.
    "d_model": MAX_HIDDEN_SIZE,
    "encoder_ffn_dim": MAX_INTERMEDIATE_SIZE,
    "encoder_layers": MAX_LAYERS,
    "decoder_layers": MAX_LAYERS,
    "encoder_attention_heads": MAX_HEADS,
    "hidden_size": MAX_HIDDEN_SIZE,
    "intermediate_size": MAX_INTERMEDIATE_SIZE,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
}

# Sub-configurations may be given as dicts; once the object exists they are configurations, or None where optional.
if TYPE_CHECKING:
    SubConfig = Any
else:
    SubConfig = dict | PreTrainedConfig | None


@strict
class UniMoeConnectorConfig(PreTrainedConfig):
    r"""Maps the states of one frozen tower to embeddings of the decoder.

    Args:
        type: "mlp" (LLaVA's mlpNx_gelu), "query_decoder" (learned queries through a Whisper decoder, Uni-MoE section
            on speech) or "qformer" (learned queries through a BLIP-2 Q-Former).
        input_size, output_size: widths of the tower's states and of the decoder's embeddings.
        depth: linear layers of "mlp"; 1 is a single projection.
        num_tokens: embeddings per item: the number of queries, or for "mlp" the length to which the positions are
            average-pooled (None keeps one embedding per position).
        output_norm: end with an RMSNorm, so that connected features start at the scale of word embeddings.
        decoder_config: `WhisperConfig` fields of "query_decoder".
        qformer_config: `Blip2QFormerConfig` fields of "qformer".
    """

    model_type = "unimoe_connector"

    type: Literal["mlp", "query_decoder", "qformer"] = "mlp"
    input_size: int = 1024
    output_size: int = 4096
    depth: int = 2
    num_tokens: int | None = None
    output_norm: bool = False
    decoder_config: dict | None = None
    qformer_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        owner = "UniMoeConnectorConfig"
        require_sizes(owner, self, {"input_size": MAX_HIDDEN_SIZE, "output_size": MAX_HIDDEN_SIZE, "depth": 16})
        if self.num_tokens is not None:
            require_range(owner, "num_tokens", self.num_tokens, 1, MAX_QUERIES)
        elif self.type != "mlp":
            raise ConfigurationError(
                f"{owner}.num_tokens is None; type {self.type!r} needs a number of queries (Uni-MoE: 50)."
            )
        for field in ("decoder_config", "qformer_config"):
            _require_inner_sizes(f"{owner}.{field}", getattr(self, field) or {})
        warn_of_misspellings(self, kwargs)
        super().__post_init__(**kwargs)


@strict
class UniMoeConfig(PreTrainedConfig):
    r"""A decoder with any subset of towers. A tower that is None does not exist; a connector without its tower is an error.

    Args:
        text_config: the decoder.
        vision_config: any vision encoder that `AutoModel` knows; serves images and video frames.
        speech_config: a Whisper configuration (its encoder is the tower) or any other `AutoModel` audio encoder.
        audio_config: the sound encoder, `UniMoeBeatsConfig` or any other. None together with a `sound_connector` means
            that the sound connector reads the speech tower's states.
        image_connector, video_connector, speech_connector, sound_connector: `UniMoeConnectorConfig`, one per branch.
            Without a video_connector video frames go through the image connector (Uni-MoE).
        image_token_id, video_token_id, audio_token_id, sound_token_id: placeholder ids; one placeholder per feature.
            audio_token_id marks speech-tower features, sound_token_id those of the sound branch.
        vision_feature_layer: index into the vision tower's hidden states.
        vision_feature_select_strategy: "patch" drops the first (class) token, "full" keeps it.
        vision_token_grid: average-pool the tower's square map to N x N positions before the connector; None keeps it.
        vision_scales: S2: the vision tower sees the picture at these multiples of its own size, cut into tiles, and the
            states of all scales lie side by side (`multiscale_unimoe.py`). Pictures come at the largest scale; a
            connector's input_size is the tower's width times the number of scales.
        video_pooling: "mean" averages the frames after the connector (Uni-MoE), "none" keeps every frame's tokens.
        video_num_frames: frames that the processor samples per video.
        route_run_end_as_text: the last feature of each run of one medium is routed as text, as MoIIE's code does.
        freeze_towers: towers start with `requires_grad=False`; a frozen tower runs without grad and in eval mode.
    """

    model_type = "unimoe"
    sub_configs = {
        "text_config": UniMoeTextConfig,
        "vision_config": AutoConfig,
        "speech_config": AutoConfig,
        "audio_config": AutoConfig,
        "image_connector": UniMoeConnectorConfig,
        "video_connector": UniMoeConnectorConfig,
        "speech_connector": UniMoeConnectorConfig,
        "sound_connector": UniMoeConnectorConfig,
    }

    text_config: SubConfig = None
    vision_config: SubConfig = None
    speech_config: SubConfig = None
    audio_config: SubConfig = None
    image_connector: SubConfig = None
    video_connector: SubConfig = None
    speech_connector: SubConfig = None
    sound_connector: SubConfig = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    sound_token_id: int | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["patch", "full"] = "patch"
    vision_token_grid: int | None = None
    vision_scales: list[int] | None = None
    video_pooling: Literal["mean", "none"] = "mean"
    video_num_frames: int = 8
    route_run_end_as_text: bool = False
    freeze_towers: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _require_few_labels("UniMoeConfig", kwargs)
        if self.text_config is None:
            self.text_config = UniMoeTextConfig()
        for field, config_class in self.sub_configs.items():
            value = getattr(self, field)
            if isinstance(value, dict):
                setattr(self, field, _build_sub_config(field, config_class, value))
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self._check_branches()
        self._check_towers()
        self._check_tokens()
        if self.vision_token_grid is not None:
            require_range("UniMoeConfig", "vision_token_grid", self.vision_token_grid, 1, 256)
        require_range("UniMoeConfig", "video_num_frames", self.video_num_frames, 1, 4096)
        warn_of_misspellings(self, kwargs)
        super().__post_init__(**kwargs)

    @property
    def connectors(self) -> dict[str, UniMoeConnectorConfig | None]:
        """The connector that each media modality goes through, None where it has none; `image`'s serves videos too."""
        return {
            "image": self.image_connector,
            "video": self.image_connector if self.video_connector is None else self.video_connector,
            "speech": self.speech_connector,
            "sound": self.sound_connector,
        }

    @property
    def placeholder_ids(self) -> dict[str, int | None]:
        """Placeholder token id of each media modality, None where it has none."""
        return {
            "image": self.image_token_id,
            "video": self.video_token_id,
            "speech": self.audio_token_id,
            "sound": self.sound_token_id,
        }

    def _check_branches(self) -> None:
        for tower, connectors in (
            ("vision_config", ("image_connector",)),
            ("speech_config", ("speech_connector", "sound_connector")),
        ):
            if getattr(self, tower) is not None and all(getattr(self, name) is None for name in connectors):
                raise ConfigurationError(f"UniMoeConfig.{tower} is set but {connectors[0]} is None: give it one.")
        for connector, towers in (
            ("image_connector", ("vision_config",)),
            ("video_connector", ("vision_config",)),
            ("speech_connector", ("speech_config",)),
            ("sound_connector", ("audio_config", "speech_config")),
        ):
            if getattr(self, connector) is None:
                continue
            if all(getattr(self, tower) is None for tower in towers):
                raise ConfigurationError(f"UniMoeConfig.{connector} is set but {' and '.join(towers)} is None.")
            if getattr(self, connector).output_size != self.text_config.hidden_size:
                raise ConfigurationError(
                    f"UniMoeConfig.{connector}.output_size is {getattr(self, connector).output_size}; it must equal "
                    f"text_config.hidden_size ({self.text_config.hidden_size})."
                )
        if self.audio_config is not None and self.sound_connector is None:
            raise ConfigurationError("UniMoeConfig.audio_config is set but sound_connector is None: give it one.")

    def _check_towers(self) -> None:
        for tower in ("vision_config", "speech_config", "audio_config"):
            config = getattr(self, tower)
            # A tower may have one size per stage, in a list, or call it something else.
            sizes = {name: high for name, high in _LARGEST_INSIDE.items() if type(getattr(config, name, None)) is int}
            require_sizes(f"UniMoeConfig.{tower}", config, sizes)
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        if type(layers) is int:
            # The hidden states are the embeddings and what each layer makes of them.
            require_range("UniMoeConfig", "vision_feature_layer", self.vision_feature_layer, -layers - 1, layers)
        if self.vision_scales is not None:
            self._check_scales()

    def _check_scales(self) -> None:
        if not self.vision_scales or sorted(set(self.vision_scales)) != self.vision_scales:
            raise ConfigurationError(
                f"UniMoeConfig.vision_scales is {self.vision_scales}; give different multiples of the tower's size in "
                "ascending order, e.g. [1, 2, 3], or None."
            )
        for scale in self.vision_scales:
            require_range("UniMoeConfig", "vision_scales", scale, 1, MAX_VISION_SCALE)
        width, size = (getattr(self.vision_config, name, None) for name in ("hidden_size", "image_size"))
        if type(width) is not int or type(size) is not int:
            raise ConfigurationError(
                f"UniMoeConfig.vision_scales is {self.vision_scales}, but vision_config has no one hidden_size and "
                "image_size to scale: set it to None."
            )
        for name in ("image_connector", "video_connector"):
            connector = getattr(self, name)
            if connector is not None and connector.input_size != width * len(self.vision_scales):
                raise ConfigurationError(
                    f"UniMoeConfig.{name}.input_size is {connector.input_size}; with vision_scales "
                    f"{self.vision_scales} it must be {width * len(self.vision_scales)} ({width} per scale)."
                )

    def _check_tokens(self) -> None:
        needed = {
            "image_token_id": self.image_connector,
            "audio_token_id": self.speech_connector,
            "sound_token_id": self.sound_connector,
        }
        for field, connector in needed.items():
            if connector is not None and getattr(self, field) is None:
                raise ConfigurationError(f"UniMoeConfig.{field} is None but its connector exists: set the token's id.")
        highest = self.text_config.vocab_size + MAX_IDS_BEYOND_VOCABULARY - 1
        for field in ("image_token_id", "video_token_id", "audio_token_id", "sound_token_id"):
            if getattr(self, field) is not None:
                require_range("UniMoeConfig", field, getattr(self, field), 0, highest)
        used = [i for i in self.placeholder_ids.values() if i is not None]
        if len(set(used)) != len(used):
            raise ConfigurationError(f"UniMoeConfig's placeholder ids are {used}; they must be different.")


def _build_sub_config(field: str, config_class: type, value: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(value)
    _require_few_labels(f"UniMoeConfig.{field}", fields)
    if config_class is AutoConfig:
        config_class = _tower_class(field, fields.pop("model_type", None))
    try:
        return config_class(**fields)
    except StrictDataclassError as error:
        raise ConfigurationError(f"Correct UniMoeConfig.{field}: {error.__cause__ or error}") from error


def _require_few_labels(owner: str, fields: Mapping[str, Any]) -> None:
    """transformers names every label of a classifier, which none of ours is: a number of them would take the memory."""
    if isinstance(fields.get("num_labels"), int):
        require_range(owner, "num_labels", fields["num_labels"], 0, MAX_LABELS)


def _require_inner_sizes(owner: str, fields: Mapping[str, Any]) -> None:
    for name, high in _LARGEST_INSIDE.items():
        if isinstance(fields.get(name), int):
            require_range(owner, name, fields[name], 1, high)
    _require_few_labels(owner, fields)


def _tower_class(field: str, model_type: Any) -> type[PreTrainedConfig]:
    if model_type is None:
        raise ConfigurationError(f"UniMoeConfig.{field} has no model_type: name the encoder's, e.g. 'whisper'.")
    if model_type == UniMoeBeatsConfig.model_type:
        return UniMoeBeatsConfig
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        close = get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigurationError(
            f"UniMoeConfig.{field}.model_type is {model_type!r}; it must be a type of model that transformers has.{hint}"
        )
    return CONFIG_MAPPING[model_type]


# `transformers serve` decides by this table whether a model takes more than text; Auto classes do not fill it.
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("unimoe", "UniMoeForCausalLM")

__all__ = ["AUTO_MAP", "UniMoeConfig", "UniMoeConnectorConfig"]
