"""The decoder: LLaMA-family attention, and an FFN that is dense or a sparse mixture of experts, layer by layer.

Experts, attention and decoder live in one file because transformers decides by the text of a model's module whether
the experts and attention implementations of that model can be chosen.

Shape suffixes: B batch, S sequence, T = B * S tokens, H hidden size, I expert width, E experts, K per token, F shared.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_unimoe_text import UniMoeTextConfig
from .masks_unimoe import causal_mask_of, without_packed
from .modeling_unimoe_moai import Mixing, UniMoeAttentionPlora, UniMoeMixer, UniMoeMLPPlora, init_moai_weights
from .quantized_experts_unimoe import experts_one_by_one, with_quantized_weights
from .rotary_unimoe import UniMoeRotaryEmbedding, apply_rotary_pos_emb
from .routing_dynamic_unimoe import UniMoeDynamicRouter
from .routing_unimoe import UniMoeRouter


class UniMoeRMSNorm(nn.Module):
    """Root mean square norm, computed in float32; the weight multiplies after the cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_float = x.float()
        x_float = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x_float.to(x.dtype)


def eager_attention_forward(
    module: "UniMoeAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as two matrix products with a float32 softmax; returns [B, S, heads, head_dim] and the weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class UniMoeAttention(nn.Module):
    """Grouped-query attention with RoPE; biases, query/key norms and a sliding window are options."""

    def __init__(self, config: UniMoeTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window
        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.plora = None if config.plora_config is None else UniMoeAttentionPlora(config)
        if config.use_qk_norm:
            self.q_norm = UniMoeRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = UniMoeRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        image_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        linears = (self.q_proj, self.k_proj, self.v_proj)
        projected = tuple(linear(hidden_states) for linear in linears)
        if self.plora is not None:
            projected = self.plora.inputs(hidden_states, projected, image_mask)
        query, key, value = (states.view(head_shape) for states in projected)
        value = value.transpose(1, 2)
        if self.config.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output.reshape(*input_shape, -1)
        result = self.o_proj(output)
        return result if self.plora is None else self.plora.output(output, result, image_mask), weights


class UniMoeMLP(nn.Module):
    """The dense SwiGLU feed-forward network."""

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.plora = None if config.plora_config is None else UniMoeMLPPlora(config)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, x_BSH: torch.Tensor, *_routing: torch.Tensor | None, image_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        gate, up = self.gate_proj(x_BSH), self.up_proj(x_BSH)
        if self.plora is not None:
            gate, up = self.plora.inputs(x_BSH, gate, up, image_mask)
        inner = self.act_fn(gate) * up
        result = self.down_proj(inner)
        return result if self.plora is None else self.plora.output(inner, result, image_mask)


@with_quantized_weights
@use_experts_implementation
class UniMoeExperts(nn.Module):
    """All experts of a layer as two fused tensors: gate_up_proj [E, 2I, H] (gate rows first) and down_proj [E, H, I]."""

    def __init__(self, config: UniMoeTextConfig, num_experts: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, x_TH: torch.Tensor, top_k_index_TK: torch.Tensor, top_k_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """The reference implementation, "eager": one expert after the other. Index E means "no expert"."""
        return experts_one_by_one(self, x_TH, top_k_index_TK, top_k_weights_TK)


class UniMoeSparseBlock(nn.Module):
    """A router and its experts, in the place of a dense FFN."""

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__()
        self.num_experts, self.num_shared_experts = config.num_experts, config.num_shared_experts
        self.has_empty_slots = config.router_type == "dynamic" or config.num_null_experts > 0
        self.gate = UniMoeDynamicRouter(config) if config.router_type == "dynamic" else UniMoeRouter(config)
        self.experts = UniMoeExperts(config, config.num_experts, config.moe_intermediate_size)
        # transformers' own switch for index E: with it every backend leaves such slots out.
        self.experts._is_expert_parallel = self.has_empty_slots  # type: ignore[assignment]
        if config.num_shared_experts:
            self.shared_experts = UniMoeExperts(config, config.num_shared_experts, config.shared_intermediate_size)

    def forward(
        self,
        x_BSH: torch.Tensor,
        token_group_BS: torch.Tensor | None = None,
        token_mask_BS: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        if self.gate.jitter_reaches_experts:
            x_TH = self.gate.jittered(x_TH)
        token_group_T, token_mask_T = (None if t is None else t.reshape(-1) for t in (token_group_BS, token_mask_BS))
        _, weights_TK, index_TK = self.gate(x_TH, token_group_T, token_mask_T)
        slots = [index_TK.shape[1] - self.num_shared_experts, self.num_shared_experts]
        (index_TK, shared_TF), (weights_TK, shared_weights_TF) = index_TK.split(slots, 1), weights_TK.split(slots, 1)
        y_TH = self.experts(x_TH, self._sendable(index_TK), weights_TK)
        if self.num_shared_experts:
            y_TH = y_TH + self.shared_experts(x_TH, shared_TF - (self.num_experts + 1), shared_weights_TF)
        return y_TH.view_as(x_BSH)

    def _sendable(self, index_TK: torch.Tensor) -> torch.Tensor:
        if not self.has_empty_slots or self.experts.num_experts == self.num_experts:
            return index_TK
        # The experts are split over ranks, and nothing can be sent to expert E: empty slots, of weight 0, go to all.
        anybody_K = torch.arange(index_TK.shape[1], device=index_TK.device) % self.num_experts
        return torch.where(index_TK == self.num_experts, anybody_K, index_TK)


class UniMoeDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: UniMoeTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = UniMoeAttention(config, layer_idx)
        self.mlp = UniMoeSparseBlock(config) if config.is_sparse(layer_idx) else UniMoeMLP(config)
        self.input_layernorm = UniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = UniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        mixed_layers = [] if config.mixer_config is None else config.mixer_config.layers
        self.mixer = UniMoeMixer(config, mixed_layers.index(layer_idx)) if layer_idx in mixed_layers else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        token_groups: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        mixing: Mixing | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        if self.mixer is not None:
            normed = self.mixer(normed, mixing)
        attended, _ = self.self_attn(
            normed, position_embeddings, attention_mask, past_key_values, image_mask=image_mask, **kwargs
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(normed, token_groups, token_mask, image_mask=image_mask)


class UniMoeTextPreTrainedModel(PreTrainedModel):
    config: UniMoeTextConfig
    base_model_prefix = "model"
    input_modalities: Any = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["UniMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = {"choice_bias_C"}
    _can_record_outputs = {
        "router_logits": OutputRecorder(UniMoeRouter, index=0),
        "hidden_states": UniMoeDecoderLayer,
        "attentions": UniMoeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_moai_weights(module)
        std = self.config.initializer_range
        if isinstance(module, UniMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, UniMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            module.reset_row_tables()
            if module.bias_update_rate:
                init.zeros_(module.choice_bias_C)
        elif isinstance(module, UniMoeTextModel):
            init.copy_(module.group_of_modality, torch.tensor(module.config.group_of_modality))


class UniMoeTextModel(UniMoeTextPreTrainedModel):
    """Embeddings, decoder layers and final norm; dense or sparse by `config.sparse_layers`."""

    group_of_modality: torch.Tensor

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([UniMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = UniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = UniMoeRotaryEmbedding(config)
        self.register_buffer("group_of_modality", torch.tensor(config.group_of_modality), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        mixing: Mixing | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: [B, S]; or inputs_embeds [B, S, H].
            mm_token_type_ids: modality id of every position, [B, S]; None means that all are text. Only models with
                more than one routing group look at it.
            image_mask: true at image positions, [B, S], where partial LoRA acts; None means nowhere.
            mixing: what the mixers read and write, see `AuxiliaryMixin.mixing`; None leaves everything as it is.
            kwargs: with `cu_seq_lens_q` (and its siblings of transformers' flash attention) several texts share a row:
                position_ids start at 0 with each of them and with the padding, which is all that attention_mask says.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds were given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)
        mask = without_packed(attention_mask, kwargs.get("cu_seq_lens_q"))
        causal_mask = causal_mask_of(self.config, mask, inputs_embeds, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        token_groups = self.token_groups(inputs_embeds, mm_token_type_ids)
        token_mask = self.token_mask(inputs_embeds, attention_mask)
        if image_mask is None and self.config.plora_config is not None and self.training:
            # Nothing is added, but what is trained is part of every step.
            image_mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                token_groups=token_groups,
                token_mask=token_mask,
                image_mask=image_mask,
                mixing=mixing,
                position_ids=position_ids,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def token_groups(self, x_BSH: torch.Tensor, mm_token_type_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Index of every token's routing group, [B, S]; None when there is just one group."""
        if len(self.config.router_groups) == 1:
            return None
        if mm_token_type_ids is None:
            mm_token_type_ids = torch.zeros(x_BSH.shape[:2], dtype=torch.long, device=x_BSH.device)
        return self.group_of_modality[mm_token_type_ids]

    def token_mask(self, x_BSH: torch.Tensor, attention_mask: Any) -> torch.Tensor | None:
        """True for tokens, false for padding, [B, S]; None when the router does not ask or the mask does not say."""
        asks = self.config.router_type == "dynamic" or self.config.router_bias_update_rate
        if not asks or getattr(attention_mask, "ndim", 0) != 2:
            return None
        return attention_mask[:, -x_BSH.shape[1] :].bool()  # what the cache holds comes first


__all__ = ["UniMoeTextModel", "UniMoeTextPreTrainedModel"]
