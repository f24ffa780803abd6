"""Configuration of MoAI's parts (arXiv 2403.07508): mixers with their compressor, and partial LoRA on images."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .errors_unimoe import ConfigurationError
from .validation_unimoe import (
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_INTERMEDIATE_SIZE,
    MAX_LAYERS,
    MAX_QUERIES,
    require_range,
    require_sizes,
    warn_of_misspellings,
)

_LARGEST_MIXER = {
    "rank": MAX_HIDDEN_SIZE,
    "num_heads": MAX_HEADS,
    "num_latents": MAX_QUERIES,
    "compressor_depth": MAX_LAYERS,
    "compressor_heads": MAX_HEADS,
    "compressor_head_dim": MAX_HIDDEN_SIZE,
    "compressor_ffn_size": MAX_INTERMEDIATE_SIZE,
}

Precision = Literal["float32", "float16", "bfloat16"]


@strict
class UniMoeMixerConfig(PreTrainedConfig):
    r"""Mixers: in some layers, six attention experts rewrite what attention reads, for image and for text positions.

    The defaults are the sizes of MoAI-7B.

    Args:
        layers: 0-based indices of the decoder layers that have a mixer.
        rank: width of the bottleneck in each projection of an expert.
        num_heads: attention heads of an expert.
        num_latents: tokens to which the compressor brings what the external vision models saw.
        compressor_depth, compressor_heads, compressor_head_dim: of the perceiver resampler that does so.
        compressor_ffn_size: width inside its feed-forward blocks; None takes the decoder's hidden size.
        expert_choice: how a training step mixes; evaluation always asks the gates. "gates": MoAI's second step.
            "random": its first, one expert at a time, drawn per layer, for images and for text.
        gate_precision, gate_training_precision: of the gates' softmax, in evaluation and in training. The original has
            float16 and bfloat16, whatever the model's dtype.
        compress_aux_padding: the compressor reads padding too, as the original's does, so that a sample's answer depends
            on its batch.
    """

    model_type = "unimoe_mixer"
    has_no_defaults_at_init = True  # its layers; transformers makes a default one to shorten what it prints

    layers: list[int] | None = None
    rank: int = 64
    num_heads: int = 4
    num_latents: int = 64
    compressor_depth: int = 4
    compressor_heads: int = 4
    compressor_head_dim: int = 64
    compressor_ffn_size: int | None = None
    expert_choice: Literal["gates", "random"] = "gates"
    gate_precision: Precision = "float32"
    gate_training_precision: Precision = "float32"
    compress_aux_padding: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        sizes = {name: high for name, high in _LARGEST_MIXER.items() if getattr(self, name) is not None}
        require_sizes("UniMoeMixerConfig", self, sizes)
        if not self.layers or sorted(set(self.layers)) != self.layers:
            raise ConfigurationError(
                f"UniMoeMixerConfig.layers is {self.layers}; give different layers in ascending order, e.g. "
                "[7, 15, 23, 31]."
            )
        warn_of_misspellings(self, kwargs)
        super().__post_init__(**kwargs)

    def require_fit(self, hidden_size: int, num_layers: int) -> None:
        """Raises a ConfigurationError unless mixers of these sizes go with a decoder of those."""
        for layer in self.layers or ():
            require_range("UniMoeMixerConfig", "layers", layer, 0, num_layers - 1)
        if hidden_size % self.num_heads:
            raise ConfigurationError(
                f"UniMoeMixerConfig.num_heads is {self.num_heads}; hidden_size ({hidden_size}) must be a multiple of it."
            )


@strict
class UniMoePloraConfig(PreTrainedConfig):
    r"""Partial LoRA (InternLM-XComposer2, arXiv 2401.16420): low-rank additions that act on image positions only.

    They stand beside every projection of attention and of dense FFNs; sparse FFNs have none.

    Args:
        rank, alpha: the addition is `up(down(x)) * alpha / rank`.
        dropout: on its input, in training only.
    """

    model_type = "unimoe_plora"

    rank: int = 256
    alpha: float | int = 256
    dropout: float | int = 0.05

    def __post_init__(self, **kwargs: Any) -> None:
        require_sizes("UniMoePloraConfig", self, {"rank": MAX_HIDDEN_SIZE})
        require_range("UniMoePloraConfig", "alpha", self.alpha, 0, 1 << 20)
        require_range("UniMoePloraConfig", "dropout", self.dropout, 0, 1)
        warn_of_misspellings(self, kwargs)
        super().__post_init__(**kwargs)


__all__ = ["UniMoeMixerConfig", "UniMoePloraConfig"]
