"""The BEATs audio encoder (arXiv 2212.09058): mel spectrogram -> patches -> transformer with gated relative positions.

It reproduces the released checkpoints' arithmetic, oddities of the padding mask included, in a plain transformers
model. What differs is storage: one relative position table for all layers, and the positional convolution as a plain
weight (the checkpoints hold it as direction and magnitude).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_unimoe_beats import UniMoeBeatsConfig
from .errors_unimoe import ConfigurationError, UniMoeError


@dataclass
class UniMoeBeatsOutput(BaseModelOutput):
    """`BaseModelOutput` plus `padding_mask`: bool [batch, tokens], True where a token is padding; None without a mask."""

    padding_mask: torch.Tensor | None = None


def reduce_padding_mask(padding_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Shortens a padding mask: an output position is padding when every input position of its group is.

    Positions that do not fill a group are dropped from the end. This is BEATs' own rule; for tokens it does not follow
    the area a patch covers (token i looks at frames 2i and 2i + 1 of a 2998-frame clip).

    Args:
        padding_mask: bool [batch, positions], True = padding.
        length: positions of the result, at most those of the input.

    Returns:
        bool [batch, length].
    """
    batch, positions = padding_mask.shape
    if not 0 < length <= positions:
        raise UniMoeError(
            f"A padding mask of {positions} positions cannot be reduced to {length}: give one flag per audio sample, "
            "or at least one per spectrogram frame."
        )
    kept = positions - positions % length
    return padding_mask[:, :kept].bool().reshape(batch, length, -1).all(dim=-1)


def relative_position_buckets(relative_positions: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """T5's bidirectional buckets (arXiv 1910.10683): exact for near positions, logarithmic up to `max_distance`.

    Args:
        relative_positions: integer tensor of any shape, key position - query position.

    Returns:
        int64 tensor of the same shape, values in [0, num_buckets).
    """
    per_direction = num_buckets // 2
    exact = per_direction // 2
    distance = relative_positions.abs()
    # The clamp keeps log() finite where the exact branch is taken anyway.
    ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (per_direction - exact)).long()).clamp(max=per_direction - 1)
    buckets = torch.where(distance < exact, distance, far)
    return buckets + (relative_positions > 0).long() * per_direction


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.dropout(functional.softmax(scores, dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class UniMoeBeatsAttention(nn.Module):
    """Self-attention with an additive relative position bias that each head gates per query (WavLM's gate)."""

    def __init__(self, config: UniMoeBeatsConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gated = config.gru_rel_pos and config.relative_position_embedding
        if self.gated:
            self.grep_linear = nn.Linear(self.head_dim, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None,
        key_padding: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens, _ = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # The original divides the logits by 32, subtracts each row's maximum and multiplies by 32 again, a guard
        # against fp16 overflow. Softmax does not see a constant per row, so the plain product is the same function.
        output, weights = attend(
            self,
            query,
            key,
            value,
            self._additive_mask(query, position_bias, key_padding),
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(batch, tokens, -1)), weights

    def _additive_mask(
        self, query: torch.Tensor, position_bias: torch.Tensor | None, key_padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The term added to the attention logits, in the query's dtype: [batch or 1, heads or 1, tokens or 1, tokens]."""
        if position_bias is None and key_padding is None:
            return None
        if position_bias is None:
            mask = query.new_zeros(1)
        elif self.gated:
            mask = (self._gate(query) * position_bias).to(query.dtype)
        else:
            mask = position_bias.to(query.dtype)
        if key_padding is not None:
            # Not -inf: a clip that is all padding would turn into NaN.
            mask = mask.masked_fill(key_padding, torch.finfo(query.dtype).min)
        return mask

    def _gate(self, query: torch.Tensor) -> torch.Tensor:
        """[batch, heads, tokens, head_dim] -> [batch, heads, tokens, 1], around 2."""
        halves = self.grep_linear(query).unflatten(-1, (2, 4)).sum(dim=-1).sigmoid()
        update, reset = halves.chunk(2, dim=-1)
        return update * (reset * self.grep_a - 1.0) + 2.0


class UniMoeBeatsLayer(GradientCheckpointingLayer):
    """One transformer layer: post-norm with a DeepNorm residual, or pre-norm."""

    def __init__(self, config: UniMoeBeatsConfig) -> None:
        super().__init__()
        self.self_attn = UniMoeBeatsAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)
        self.norm_first = config.layer_norm_first
        self.residual_scale = config.residual_scale

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None,
        key_padding: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.norm_first:
            attended, _ = self.self_attn(
                self.self_attn_layer_norm(hidden_states), position_bias, key_padding, **kwargs
            )
            hidden_states = hidden_states + self.dropout(attended)
            return hidden_states + self._feed_forward(self.final_layer_norm(hidden_states))
        attended, _ = self.self_attn(hidden_states, position_bias, key_padding, **kwargs)
        hidden_states = self.self_attn_layer_norm(hidden_states * self.residual_scale + self.dropout(attended))
        return self.final_layer_norm(hidden_states * self.residual_scale + self._feed_forward(hidden_states))

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.fc1(hidden_states)
        inner = self.activation(inner.float()).to(inner.dtype)
        return self.dropout(self.fc2(self.activation_dropout(inner)))


class UniMoeBeatsEncoder(nn.Module):
    """Positional convolution and the transformer layers; owns the relative position table that all layers read."""

    def __init__(self, config: UniMoeBeatsConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel_size=config.num_conv_pos_embeddings,
            padding=config.num_conv_pos_embeddings // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        if config.relative_position_embedding:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_attention_heads)
        self.layers = nn.ModuleList([UniMoeBeatsLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        key_padding = None
        if padding_mask is not None:
            hidden_states = hidden_states.masked_fill(padding_mask[..., None], 0.0)
            key_padding = padding_mask[:, None, None, :]
        hidden_states = hidden_states + self._convolve_positions(hidden_states)
        if not self.config.layer_norm_first:
            hidden_states = self.layer_norm(hidden_states)
        hidden_states = self.dropout(hidden_states)
        position_bias = self._position_bias(hidden_states) if self.config.relative_position_embedding else None
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_bias, key_padding, **kwargs)
        return self.layer_norm(hidden_states) if self.config.layer_norm_first else hidden_states

    def _convolve_positions(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.shape[1]
        # An even kernel with symmetric padding yields one position too many; the original drops the last.
        convolved = self.pos_conv(hidden_states.transpose(1, 2))[..., :tokens]
        return functional.gelu(convolved).transpose(1, 2)

    def _position_bias(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[1, heads, tokens, tokens]: the table's entry for key position - query position."""
        tokens = hidden_states.shape[1]
        offsets = torch.arange(1 - tokens, tokens, device=hidden_states.device)
        buckets = relative_position_buckets(offsets, self.config.num_buckets, self.config.max_distance)
        # A query's row is a window of the table over all offsets: the last query reads the first window.
        windows = self.relative_attention_bias(buckets).t().unfold(-1, tokens, 1)
        return windows.flip(1).unsqueeze(0)


class UniMoeBeatsModel(PreTrainedModel):
    """BEATs without its classification head.

    `hidden_states` of the output holds the input of the first layer and the output of every layer (the last one after
    the final norm when `layer_norm_first`).
    """

    config: UniMoeBeatsConfig
    base_model_prefix = "beats"
    main_input_name = "input_features"
    input_modalities = ("audio",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["UniMoeBeatsLayer"]
    _supports_sdpa = True
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {"hidden_states": UniMoeBeatsLayer, "attentions": UniMoeBeatsAttention}

    def __init__(self, config: UniMoeBeatsConfig) -> None:
        super().__init__(config)
        if config.hidden_act not in ACT2FN:
            raise ConfigurationError(
                f"UniMoeBeatsConfig.hidden_act is {config.hidden_act!r}; transformers has no activation of that name "
                "(released BEATs models: 'gelu')."
            )
        self.patch_embedding = nn.Conv2d(
            1, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size, bias=config.conv_bias
        )
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.post_extract_proj = (
            nn.Linear(config.embed_dim, config.hidden_size)
            if config.embed_dim != config.hidden_size
            else nn.Identity()
        )
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        self.encoder = UniMoeBeatsEncoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, UniMoeBeatsAttention) and module.gated:
            init.ones_(module.grep_a)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_features: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> UniMoeBeatsOutput:
        """Encodes mel spectrograms (Uni-MoE section on the audio encoder; BEATs section 3).

        Args:
            input_features: float [batch, frames, mel bins], normalised log-mel energies; at least `patch_size` frames.
            padding_mask: bool [batch, samples] of the waveform (or [batch, frames]), True = padding. None when every
                clip fills its row.

        Returns:
            `last_hidden_state` [batch, tokens, hidden_size] with tokens = frames // 16 * 8 for the released models,
            time-major then frequency; `padding_mask` reduced to the tokens. Padded tokens hold no meaning.

        Raises:
            UniMoeError: the features or the mask do not have these shapes.
        """
        self._check_shapes(input_features, padding_mask)
        frames = input_features.shape[1]
        patches = self.patch_embedding(input_features.to(self.patch_embedding.weight.dtype).unsqueeze(1))
        hidden_states = self.layer_norm(patches.flatten(2).transpose(1, 2))
        token_padding = None
        if padding_mask is not None:
            token_padding = reduce_padding_mask(reduce_padding_mask(padding_mask, frames), hidden_states.shape[1])
        hidden_states = self.feature_dropout(self.post_extract_proj(hidden_states))
        hidden_states = self.encoder(hidden_states, token_padding, **kwargs)
        return UniMoeBeatsOutput(last_hidden_state=hidden_states, padding_mask=token_padding)

    def _check_shapes(self, input_features: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        config = self.config
        shape = tuple(input_features.shape)
        if len(shape) != 3 or shape[2] != config.num_mel_bins or shape[1] < config.patch_size:
            raise UniMoeError(
                f"input_features has shape {shape}; expected [batch, frames, {config.num_mel_bins}] with at least "
                f"{config.patch_size} frames. Make them with the model's processor."
            )
        if padding_mask is not None and (padding_mask.ndim != 2 or padding_mask.shape[0] != shape[0]):
            raise UniMoeError(
                f"padding_mask has shape {tuple(padding_mask.shape)}; expected [{shape[0]}, samples], one row per clip."
            )


__all__ = ["UniMoeBeatsModel", "UniMoeBeatsOutput", "reduce_padding_mask", "relative_position_buckets"]
