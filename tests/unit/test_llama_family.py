"""LLaMA-family decoders give the same logits in our decoder, and look-alikes are refused with the reason."""

from typing import Any

import pytest
import tiny_llama
import torch
from tiny_llama import DYNAMIC, LINEAR, LLAMA3, LONGROPE, YARN
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from unimoe.conversion.dense.llama_family import text_config_from, why_not
from unimoe.conversion.upcycling.sparsity import Sparsity
from unimoe.conversion.upcycling.upcycle import upcycle_model
from unimoe.errors import ConversionError

SIZES = tiny_llama.SIZES | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Phi-3 gives the length of its first training beside the factors.
PHI3_LONGROPE = {k: v for k, v in LONGROPE.items() if k not in ("factor", "original_max_position_embeddings")}
PHI3 = {**SIZES, "rms_norm_eps": 1e-5}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama biased": LlamaConfig(**SIZES, attention_bias=True),
    "llama-3 rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama dynamic rope": LlamaConfig(**{**SIZES, "max_position_embeddings": 16}, rope_parameters=DYNAMIC),
    "smollm": LlamaConfig(
        **{**SIZES, "hidden_size": 48, "num_attention_heads": 6}, tie_word_embeddings=True, rope_theta=100_000.0
    ),
    "phi-3": Phi3Config(**PHI3, sliding_window=None),
    "phi-3 window": Phi3Config(**PHI3, sliding_window=8, tie_word_embeddings=True),
    "phi-3 all heads its own": Phi3Config(**{**PHI3, "num_key_value_heads": 4}),
    "phi-3 longrope": Phi3Config(**PHI3, original_max_position_embeddings=16, rope_parameters=PHI3_LONGROPE),
    "linear rope, own head size": LlamaConfig(**SIZES, rope_parameters=LINEAR, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "mistral without window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 window on every layer": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0
    ),
    "qwen2 yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


def source_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Norm weights and biases start as ones and zeros, which would hide a wrong mapping.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str) -> None:
    source = source_model(CONFIGS[name])
    ours = tiny_llama.dense_from(source)
    sparse = upcycle_model(ours, Sparsity(num_experts=4, num_experts_per_tok=2, sparse_layers=[1]))
    # Longer than any sliding window and than the original context of the scaled RoPEs.
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    far = torch.arange(40)[None] + 30_000
    with torch.no_grad():
        for inputs in ({"input_ids": ids}, {"input_ids": ids[:, :12]}, {"input_ids": ids, "position_ids": far}):
            expected = source(**inputs).logits
            assert (ours(**inputs).logits - expected).abs().max() <= 1e-5
            assert (sparse(**inputs).logits - expected).abs().max() <= 1e-5
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for prompt in (ids[:1], ids[:, :9]):  # the second one grows beyond what scaled RoPEs call short
        # Phi-3 of transformers 5.17 loses its first tokens where the RoPE changes, unless it has no cache.
        expected = source.generate(prompt, use_cache="longrope" not in name, **greedy)
        assert torch.equal(ours.generate(prompt, **greedy), expected)


def test_sliding_window_is_read_per_family() -> None:
    assert text_config_from(CONFIGS["mistral"]).sliding_window == 8
    assert text_config_from(Qwen2Config(**SIZES, sliding_window=8)).sliding_window is None
    # LLaMA never slides, whatever is left in a config.json of a model that was Mistral's before.
    left = LlamaConfig(**SIZES, sliding_window=8, layer_types=["sliding_attention"] * SIZES["num_hidden_layers"])
    assert text_config_from(left).sliding_window is None


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("phi3", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type='proportional'"),
        ("mixtral", {}, "mixture of experts already"),
        ("gemma", {"head_dim": 8}, "norms add one"),
        ("gemma2", {"head_dim": 8}, "further norms"),
        ("gpt2", {}, "GPT style"),
        ("granite", {"residual_multiplier": 0.5}, "residual_multiplier=0.5"),
        ("granite", {}, "attention_multiplier=1.0"),
        ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta=0.1"),
        ("llama", {"mlp_bias": True}, "feed-forward networks have biases"),
        ("smollm3", {}, "no_rope_layers"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "attend in different ways"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        text_config_from(AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 4, **fields}))


def test_broken_checkpoints_are_refused_with_the_tensor_that_shows_it() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in source_model(CONFIGS["llama"]).state_dict().items()}
    assert why_not(shapes) is None
    assert why_not({**shapes, "model.layers.0.rotary_emb.inv_freq": (4,)}) is None

    missing = {name: shape for name, shape in shapes.items() if name != "model.layers.1.mlp.up_proj.weight"}
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(why_not(missing))
    gap = {name: shape for name, shape in shapes.items() if ".layers.1." not in name}
    assert "numbered [0, 2]" in str(why_not(gap))
    assert "model.extra" in str(why_not({**shapes, "model.extra": (1,)}))

    with pytest.raises(ConversionError, match=r"lm_head.weight is missing"):
        text_config_from(CONFIGS["llama"], {n: s for n, s in shapes.items() if n != "lm_head.weight"})
    with pytest.raises(ConversionError, match=r"q_proj.weight has shape \[8, 8\]"):
        text_config_from(CONFIGS["llama"], {**shapes, "model.layers.2.self_attn.q_proj.weight": (8, 8)})
