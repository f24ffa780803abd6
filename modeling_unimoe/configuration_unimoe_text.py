"""Configuration of the decoder: a LLaMA-family language model, dense or sparse, with routing as data."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_unimoe_moai import UniMoeMixerConfig, UniMoePloraConfig
from .errors_unimoe import ConfigurationError
from .routing_validation_unimoe import LOSS_COEFFICIENTS, MODALITIES, require_routing
from .validation_unimoe import (
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_INTERMEDIATE_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    require_activation,
    require_range,
    require_rope,
    require_sizes,
    warn_of_misspellings,
)

_LARGEST = {
    "vocab_size": MAX_VOCAB_SIZE,
    "hidden_size": MAX_HIDDEN_SIZE,
    "intermediate_size": MAX_INTERMEDIATE_SIZE,
    "moe_intermediate_size": MAX_INTERMEDIATE_SIZE,
    "shared_intermediate_size": MAX_INTERMEDIATE_SIZE,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "head_dim": MAX_HIDDEN_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
}

# May be given as a dict; once the object exists it is a configuration or None.
if TYPE_CHECKING:
    SubConfig = Any
else:
    SubConfig = dict | PreTrainedConfig | None


@dataclass(frozen=True)
class RouterGroup:
    """One routing group: the experts that the tokens of some modalities may choose from."""

    name: str
    experts: tuple[int, ...]
    modalities: tuple[str, ...]


@strict
class UniMoeTextConfig(PreTrainedConfig):
    r"""The decoder: LLaMA-family, dense or sparse.

    Args:
        head_dim: size of one attention head; `hidden_size // num_attention_heads` when absent.
        attention_bias: biases on the q, k and v projections (Qwen2). `attention_output_bias` adds one to o_proj.
        use_qk_norm: RMSNorm on each query and key head before RoPE (Qwen3).
        sliding_window: attention span in tokens on every layer; None attends to everything.
        mixer_config: `UniMoeMixerConfig`: some layers have a mixer (MoAI); None: none has.
        plora_config: `UniMoePloraConfig`: additions for image positions (MoAI); None: there are none.
        num_experts: experts in each sparse layer; 0 makes a dense decoder.
        num_experts_per_tok: experts that each token uses.
        moe_intermediate_size: FFN width of one expert; `intermediate_size` when absent.
        sparse_layers: 0-based indices of the layers whose FFN is sparse; None means every layer.
        expert_groups: group name -> ids of the experts its tokens may choose from. Groups may overlap (MoIIE's shared
            experts). None means one group that holds every expert (Uni-MoE).
        modality_groups: modality name (see `MODALITIES`) -> group name. Needed with `expert_groups` unless the
            groups are named after the modalities.
        router_scoring: how logits become weights, over the experts of the token's group.
        norm_topk_prob: divide the chosen weights by their sum.
        router_jitter_noise: relative size of the multiplicative uniform noise on the router's input, training only.
        router_jitter_reaches_experts: the experts read the noisy states too (MoIIE).
        router_type: "top_k" gives every token `num_experts_per_tok` choices (`routing_unimoe.py`). "dynamic" lets the
            router's certainty decide (`routing_dynamic_unimoe.py`): DCMoE and UniMoE-Audio. It has one group, softmax
            scores and normalised weights.
        num_null_experts: further choices, in every group, that compute nothing; the weight they get is lost.
        num_shared_experts: experts that every token uses beside its choices; the gate weighs them too.
        shared_intermediate_size: FFN width of one shared expert; `moe_intermediate_size` when absent.
        router_top_p: "dynamic" only. A token takes its best choices until their probabilities reach this sum; 0 gives
            each token `num_experts_per_tok` choices, which a positive value leaves without meaning.
        router_near_max_band: "dynamic" only. A choice's weight is its probability among the choices left whose logits
            lie below the best one's by at most this share of the larger of both sizes.
        router_in_float32: compute the gate's logits in float32 whatever the model's dtype. "dynamic" always does.
        router_pick: "max" takes the best choices. "sample" draws them in training, "sample_always" in evaluation too,
            which makes answers random; both by Gumbel-max. "top_k" draws all but a token's best choice, from all that
            are left; weights stay those without noise (Uni-MoE's 8 experts always do so). "dynamic" draws every choice
            from the band, and learns through the pick by the straight-through rule.
        expert_capacity_factor: "dynamic" only. An expert keeps at most factor * tokens / choices of a batch's tokens
            and drops the rest, in evaluation too: results then depend on the batch. None drops nothing.
        min_expert_capacity: what an expert keeps however small the batch.
        capacity_policy: who stays, the highest logits ("probs") or the first tokens ("position"). As in the original,
            "position" limits shared experts too.
        router_aux_loss_coef: weight of the load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4-6), which is
            a sum over the groups, each over its own tokens and experts.
        router_group_aux_loss_coefs: group name -> its own weight; groups that are not named keep router_aux_loss_coef.
        router_aux_loss_layers: over what the load is even: in "each" layer, or in the sum of all, "joint" (MoIIE).
        router_aux_loss_counts: "top_k" only. Which choices are load: "all" of a token, or the "first" (GShard, Uni-MoE).
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), over a token's own gate rows.
        router_bias_update_rate: "top_k" only. Above 0, loss-free balancing (arXiv 2408.15664): every gate row has a bias
            that joins the scores when experts are chosen, not when they are weighed. The trainer moves it by this
            much after each optimizer step, up where a row got less than its group's mean load, down where more. The
            biases are saved with the model, so the rate must stay as long as they are to count.
        modality_experts: modality name -> ids of the experts that its tokens shall prefer.
        router_modality_loss_coef: weight of the loss that draws tokens to the `modality_experts` of their modality.
        router_divergence_loss_coef: weight of the loss that drives the experts' use by different modalities apart.
            Nothing bounds it below: keep it small.
        router_losses_as_released: compute the load-balancing, modality and divergence losses as Uni-MoE's 8-expert code
            does: sums over layers and samples, padding included; see `losses_unimoe.py`.
    """

    model_type = "unimoe_text"
    base_config_key = "text_config"
    sub_configs = {"mixer_config": UniMoeMixerConfig, "plora_config": UniMoePloraConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "num_experts"}
    default_theta = 10_000.0

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.plora.q_b": "colwise",
        "layers.*.self_attn.plora.k_b": "colwise",
        "layers.*.self_attn.plora.v_b": "colwise",
        "layers.*.self_attn.plora.o_a": "rowwise",
        "layers.*.mlp.plora.gate_b": "colwise",
        "layers.*.mlp.plora.up_b": "colwise",
        "layers.*.mlp.plora.down_a": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.shared_experts": "moe_tp_experts",
    }
    # Shared experts are not here: every token uses them, so every rank keeps them.
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float | int = 0.0
    use_qk_norm: bool = False
    sliding_window: int | None = None
    mixer_config: SubConfig = None
    plora_config: SubConfig = None

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    sparse_layers: list[int] | None = None
    expert_groups: dict[str, list[int]] | None = None
    modality_groups: dict[str, str] | None = None
    router_scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    router_jitter_noise: float | int = 0.0
    router_jitter_reaches_experts: bool = False
    router_type: Literal["top_k", "dynamic"] = "top_k"
    num_null_experts: int = 0
    num_shared_experts: int = 0
    shared_intermediate_size: int | None = None
    router_top_p: float | int = 0.0
    router_near_max_band: float | int = 0.02
    router_in_float32: bool = False
    router_pick: Literal["max", "sample", "sample_always"] = "max"
    expert_capacity_factor: float | int | None = None
    min_expert_capacity: int = 8
    capacity_policy: Literal["probs", "position"] = "probs"
    router_aux_loss_coef: float | int = 0.0
    router_group_aux_loss_coefs: dict[str, float | int] | None = None
    router_aux_loss_counts: Literal["all", "first"] = "all"
    router_aux_loss_layers: Literal["each", "joint"] = "each"
    router_z_loss_coef: float | int = 0.0
    router_bias_update_rate: float | int = 0.0
    modality_experts: dict[str, list[int]] | None = None
    router_modality_loss_coef: float | int = 0.0
    router_divergence_loss_coef: float | int = 0.0
    router_losses_as_released: bool = False
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Before anything is made of it: a list of that many layers would take the memory.
        require_range("UniMoeTextConfig", "num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.shared_intermediate_size is None:
            self.shared_intermediate_size = self.moe_intermediate_size
        if self.sparse_layers is None:
            self.sparse_layers = list(range(self.num_hidden_layers)) if self.num_experts else []
        if self.expert_groups is not None:
            # Gate rows follow the order of the groups, and a saved configuration comes back sorted by name.
            self.expert_groups = dict(sorted(self.expert_groups.items()))
        for field, config_class in self.sub_configs.items():
            if isinstance(getattr(self, field), dict):
                setattr(self, field, config_class(**getattr(self, field)))
        self._check_sizes()
        if self.mixer_config is not None:
            self.mixer_config.require_fit(self.hidden_size, self.num_hidden_layers)
        require_routing(self)
        warn_of_misspellings(self, kwargs)
        super().__post_init__(**kwargs)
        require_rope("UniMoeTextConfig", self.rope_parameters)  # complete only now, with `rope_theta` and the like

    @property
    def router_groups(self) -> list[RouterGroup]:
        """The routing groups in gate-row order, by name; one group "all" when `expert_groups` is None."""
        if self.expert_groups is None:
            return [RouterGroup("all", tuple(range(self.num_experts)), MODALITIES)]
        members: dict[str, list[str]] = {name: [] for name in self.expert_groups}
        for modality in MODALITIES:
            members[self._group_of(modality)].append(modality)
        return [RouterGroup(name, tuple(ids), tuple(members[name])) for name, ids in self.expert_groups.items()]

    @property
    def group_of_modality(self) -> list[int]:
        """Index into `router_groups` for each modality id."""
        if self.expert_groups is None:
            return [0] * len(MODALITIES)
        names = list(self.expert_groups)
        return [names.index(self._group_of(modality)) for modality in MODALITIES]

    @property
    def aux_loss_coefs(self) -> list[float]:
        """Weight of every group's load-balancing loss, in gate-row order."""
        own = self.router_group_aux_loss_coefs or {}
        return [float(own.get(group.name, self.router_aux_loss_coef)) for group in self.router_groups]

    @property
    def num_gate_rows(self) -> int:
        """Rows of a sparse layer's gate: per group its experts and the null experts, then the shared experts."""
        choices = sum(len(group.experts) + self.num_null_experts for group in self.router_groups)
        return choices + self.num_shared_experts

    @property
    def max_choices_per_token(self) -> int:
        """How many experts, null experts included, a token chooses at most; shared experts come on top."""
        if not self.router_top_p:
            return self.num_experts_per_tok
        # The best j of C probabilities sum to at least j / C, so top_p is reached no later than this.
        choices = self.num_experts + self.num_null_experts
        return min(choices, math.floor(self.router_top_p * choices) + 1)

    @property
    def even_experts_per_token(self) -> float:
        """Routed experts that a token uses when the router has no preference; with `router_top_p`, that is the most."""
        if not self.num_experts:
            return 0.0
        shares = [len(group.experts) / (len(group.experts) + self.num_null_experts) for group in self.router_groups]
        return self.max_choices_per_token * sum(shares) / len(shares)

    def is_sparse(self, layer_index: int) -> bool:
        return layer_index in self.sparse_layers

    def _group_of(self, modality: str) -> str:
        group = (self.modality_groups or {}).get(modality, modality)
        if group not in self.expert_groups:
            raise ConfigurationError(
                f"UniMoeTextConfig.modality_groups sends {modality!r} to {group!r}, which is not in expert_groups "
                f"({sorted(self.expert_groups)}). Give every modality of {MODALITIES} a group that exists."
            )
        return group

    def _check_sizes(self) -> None:
        owner = "UniMoeTextConfig"
        require_sizes(owner, self, _LARGEST)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigurationError(
                f"{owner}.num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise ConfigurationError(
                f"{owner}.head_dim is {self.head_dim}; it must be even, because RoPE turns pairs of values."
            )
        require_activation(owner, "hidden_act", self.hidden_act)
        if self.sliding_window is not None:
            require_range(owner, "sliding_window", self.sliding_window, 1, MAX_POSITIONS)
        if self.pad_token_id is not None:
            require_range(owner, "pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        for field in ("initializer_range", "rms_norm_eps", "attention_dropout"):
            require_range(owner, field, getattr(self, field), 0, 1)


__all__ = ["LOSS_COEFFICIENTS", "MODALITIES", "RouterGroup", "UniMoeTextConfig"]
