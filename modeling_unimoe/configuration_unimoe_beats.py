"""Configuration of the BEATs audio encoder (arXiv 2212.09058)."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .errors_unimoe import ConfigurationError
from .validation_unimoe import MAX_HEADS, MAX_HIDDEN_SIZE, MAX_INTERMEDIATE_SIZE, MAX_LAYERS, require_sizes

# Field of a released checkpoint's `cfg` -> (our field, the value the original code uses when the field is absent).
_ORIGINAL_FIELDS: dict[str, tuple[str, Any]] = {
    "input_patch_size": ("patch_size", None),
    "embed_dim": ("embed_dim", 512),
    "conv_bias": ("conv_bias", False),
    "encoder_layers": ("num_hidden_layers", 12),
    "encoder_embed_dim": ("hidden_size", 768),
    "encoder_ffn_embed_dim": ("intermediate_size", 3072),
    "encoder_attention_heads": ("num_attention_heads", 12),
    "activation_fn": ("hidden_act", "gelu"),
    "layer_norm_first": ("layer_norm_first", False),
    "deep_norm": ("deep_norm", False),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "dropout_input": ("feature_dropout", 0.0),
    "conv_pos": ("num_conv_pos_embeddings", 128),
    "conv_pos_groups": ("num_conv_pos_embedding_groups", 16),
    "relative_position_embedding": ("relative_position_embedding", False),
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_distance", 1280),
    "gru_rel_pos": ("gru_rel_pos", False),
}

_LARGEST = {
    "num_mel_bins": 4096,
    "patch_size": 1024,
    "embed_dim": MAX_HIDDEN_SIZE,
    "hidden_size": MAX_HIDDEN_SIZE,
    "intermediate_size": MAX_INTERMEDIATE_SIZE,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_conv_pos_embeddings": 4096,
    "num_conv_pos_embedding_groups": MAX_HIDDEN_SIZE,
    "num_buckets": 1 << 16,
    "max_distance": 1 << 24,
}


@strict
class UniMoeBeatsConfig(PreTrainedConfig):
    r"""The BEATs encoder: mel spectrogram patches through a transformer with gated relative positions.

    The defaults describe BEATs iter3+ fine-tuned on AudioSet-2M, the encoder of Uni-MoE's audio model. Dropouts act in
    training mode only.

    Args:
        num_mel_bins: height of the spectrogram.
        patch_size: side of a square patch, in frames and in mel bins.
        embed_dim: width of a patch embedding; a linear layer follows when it differs from `hidden_size`.
        conv_bias: bias of the patch convolution.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act: the transformer.
        num_conv_pos_embeddings, num_conv_pos_embedding_groups: kernel size and groups of the positional convolution.
        relative_position_embedding: add a T5-style bias per relative position, one table shared by all layers.
        num_buckets, max_distance: size of that table and the distance, in tokens, from which all share a bucket.
        gru_rel_pos: scale the bias by a gate that each layer computes from its queries.
        deep_norm: multiply the residual by `(2 * num_hidden_layers) ** 0.25` (DeepNorm; only with post-norm layers).
        layer_norm_first: pre-norm layers with one final norm in place of post-norm layers.
        hidden_dropout, attention_dropout, activation_dropout, feature_dropout: dropout after each sublayer, on the
            attention weights, inside the feed-forward, and on the projected patches.
    """

    model_type = "unimoe_beats"
    base_config_key = "audio_config"

    num_mel_bins: int = 128
    patch_size: int = 16
    embed_dim: int = 512
    conv_bias: bool = False
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    relative_position_embedding: bool = True
    num_buckets: int = 320
    max_distance: int = 800
    gru_rel_pos: bool = True
    deep_norm: bool = True
    layer_norm_first: bool = False
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.0
    feature_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self._check()
        super().__post_init__(**kwargs)

    @classmethod
    def from_original(cls, cfg: Mapping[str, Any]) -> "UniMoeBeatsConfig":
        """Translates the `cfg` dictionary of a released BEATs checkpoint.

        Fields that only concern training from scratch or the classification head (`encoder_layerdrop`,
        `layer_wise_gradient_decay_ratio`, `finetuned_model`, `predictor_*`) have no counterpart and are left out.

        Raises:
            ConfigurationError: `input_patch_size` is absent or not positive, or the values cannot work together.
        """
        patch_size = cfg.get("input_patch_size", -1)
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ConfigurationError(
                f"The BEATs cfg has input_patch_size {patch_size!r}; it must be a positive number (released models: 16)."
            )
        return cls(**{ours: cfg.get(theirs, absent) for theirs, (ours, absent) in _ORIGINAL_FIELDS.items()})

    def to_original(self) -> dict[str, Any]:
        """The `cfg` dictionary of a BEATs checkpoint; `from_original` gives this configuration back."""
        fields = {theirs: getattr(self, ours) for theirs, (ours, _) in _ORIGINAL_FIELDS.items()}
        return {**fields, "finetuned_model": False}

    @property
    def num_mel_patches(self) -> int:
        """Tokens per time step: patches that are stacked along the frequency axis."""
        return self.num_mel_bins // self.patch_size

    def num_tokens(self, num_frames: int) -> int:
        """Tokens that the encoder makes of `num_frames` spectrogram frames (2998 frames -> 1496)."""
        return num_frames // self.patch_size * self.num_mel_patches

    @property
    def residual_scale(self) -> float:
        """DeepNorm's alpha (arXiv 2203.00555); 1 without `deep_norm`."""
        return math.pow(2 * self.num_hidden_layers, 0.25) if self.deep_norm else 1.0

    def _check(self) -> None:
        require_sizes("UniMoeBeatsConfig", self, _LARGEST)
        for field in ("hidden_dropout", "attention_dropout", "activation_dropout", "feature_dropout"):
            self._require(field, 0 <= getattr(self, field) <= 1, "it must be between 0 and 1")
        self._require("layer_norm_eps", 0 < self.layer_norm_eps < 1, "it must be between 0 and 1")
        for field in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            self._require(
                field, self.hidden_size % getattr(self, field) == 0, f"it must divide hidden_size ({self.hidden_size})"
            )
        self._require(
            "num_mel_bins",
            self.patch_size <= self.num_mel_bins < self.patch_size * (self.patch_size + 1),
            f"it must hold between 1 and patch_size patches of {self.patch_size} bins, because every token's padding "
            "flag comes from whole frames",
        )
        if self.relative_position_embedding:
            exact = self.num_buckets // 4
            self._require("num_buckets", exact >= 1, "it must be at least 4")
            self._require("max_distance", self.max_distance > exact, f"it must be above num_buckets // 4 ({exact})")

    def _require(self, field: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ConfigurationError(f"UniMoeBeatsConfig.{field} is {getattr(self, field)!r}; {remedy}.")


__all__ = ["UniMoeBeatsConfig"]
